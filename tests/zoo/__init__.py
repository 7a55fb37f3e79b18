"""Small networks that each show one way in which channels are coupled."""
