"""What every ATen operator does to channel labels: tables of rules, one file per family."""
