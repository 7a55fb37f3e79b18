"""Samples of operators that move data around, and of those that make it."""

import torch

from tests.op_cases import Pick, Sample
from tests.op_tensors import B, C, P, S, U, X, below, do, merged, used

aten = torch.ops.aten

# One line, one sample.
# fmt: off


def views() -> list[Sample]:
    view, flat = aten.view.default, aten.flatten.using_ints
    split = do(view, X(2, 12, 5), [2, 3, 4, 5])
    turned = do(aten.transpose.int, split, 1, 2)
    packed = do(aten.clone.default, turned, memory_format=torch.contiguous_format)
    heads = do(aten.permute.default, do(view, X(2, 3, 12), [2, 3, 4, 3]), [0, 2, 1, 3])
    bent = do(aten.permute.default, X(2, 6, 3, 5, axes=(1,)), [0, 2, 3, 1])
    stacked = do(aten.stack.default, [X(2, 7, 5), X(2, 7, 5)], 2)
    shuffled = do(aten.reshape.default, turned, [2, 12, 5])
    flattened = do(flat, X(2, 7, 3, 5, axes=(0, 1)), 1)
    wide = do(aten.expand.default, X(1, 7), [5, 7])
    twice = do(aten.mul.Tensor, X(7, 1), X(1, 5))
    return [
        S(view, "axes of size 1", "a0 a1 a2", X(2, 7, 5), [2, 1, 7, 5, 1]),
        S(view, "channels split", "a0 a1 a2", X(2, 12, 5), [2, 3, 4, 5]),
        S(view, "channels split and used", "a0 a1 a2", X(2, 12, 5), [2, 3, 4, 5], then=used),
        S(view, "channels split in three", "a0 a1 a2", X(2, 12, 5), [2, 3, 2, 2, 5]),
        S(view, "channels split twice", "a0 a1 a2", split, [2, 3, 2, 2, 5], then=used),
        S(view, "a block split off", "a0 a1 a2", do(aten.slice.Tensor, split, 1, 0, 2), [2, 8, 5]),
        S(view, "channels and space merged", "a0 a1", X(2, 7, 3, 5), [2, 105]),
        S(view, "space merged", "a1", X(2, 7, 3, 5, axes=(1,)), [2, 7, 15]),
        S(view, "merged, then split", "a0 a1", flattened, [2, 7, 15]),
        S(view, "merged, then split elsewhere", "a0 a1", flattened, [2, 21, 5]),
        S(view, "split, then merged", "a0 a1 a2", split, [2, 12, 5]),
        S(aten.reshape.default, "a shuffle merged elsewhere", "a0 a1 a2", turned, [2, 4, 15]),
        S(aten.reshape.default, "shuffled twice", "a0 a1 a2",
          do(aten.transpose.int, do(view, shuffled, [2, 6, 2, 5]), 1, 2), [2, 12, 5]),
        S(aten.reshape.default, "stacked, then merged", "a0 a1 a2 b0 b1 b2", stacked, [2, 14, 5]),
        S(aten.reshape.default, "stacked in front, then merged", "a0 a1 a2 b0 b1 b2",
          do(aten.stack.default, [X(2, 7, 5), X(2, 7, 5)], 1), [2, 14, 5]),
        S(view, "expanded, then merged", "a1", do(aten.clone.default, wide), [35]),
        S(view, "outer product, merged", "a0", twice, [35]),
        S(view, "an axis inferred", "a1", X(2, 7, 3, 5, axes=(1,)), [2, -1, 15]),
        S(view, "everything in one", "a1", X(2, 7, 3, axes=(1,)), [42]),
        S(aten.reshape.default, "heads, then blocks", "a0 a1 a2", heads, [2, 4, 9]),
        S(view, "parameter", "a0 a1", P(7, 3, 5), [7, 15]),
        S(aten.view.dtype, "same width", "a0 a1 a2", X(2, 7, 5), torch.int64),
        S(aten._unsafe_view.default, "a channel shuffle", "a0 a1 a2", packed, [2, 12, 5]),
        S(aten.reshape.default, "channels last, rows merged", "a1", bent, [30, 6]),
        S(aten.reshape.default, "a channel shuffle", "a0 a1 a2", turned, [2, 12, 5]),
        S(aten.reshape.default, "channels merged", "a0 a1", X(2, 7, 3, 5), [2, 105]),
        S(aten._reshape_alias.default, "channels merged", "a0 a1",
          X(2, 7, 3, 5), [2, 105], [105, 1]),
        S(aten.flatten.using_ints, "channels and space", "a0 a1", X(2, 7, 3, 5), 1),
        S(aten.flatten.using_ints, "space", "a1", X(2, 7, 3, 5, axes=(1,)), 2, 3),
        S(aten.unflatten.int, "channels", "a0 a1 a2", X(2, 12, 5), 1, [3, 4]),
        S(aten.unflatten.int, "negative axis", "a0 a1 a2", X(2, 5, 12), -1, [3, -1]),
        S(aten.squeeze.default, "all", "a1 a3", X(1, 7, 1, 5)),
        S(aten.squeeze.dim, "one", "a0 a1", X(2, 7, 1, 1), 3),
        S(aten.squeeze.dims, "two", "a0 a1", X(2, 7, 1, 1), [2, -1]),
        S(aten.squeeze_.dim, "in place", "a0 a2", X(2, 1, 7), 1),
        S(aten.unsqueeze.default, "behind", "a0 a1 a2", X(2, 7, 5), -1),
        S(aten.unsqueeze.default, "before", "a0 a1 a2", X(2, 7, 5), 1),
        S(aten.unsqueeze_.default, "in place", "a0 a1 a2", X(2, 7, 5), 0),
        S(aten.permute.default, "plain", "a0 a1 a2 a3", X(2, 7, 3, 5), [0, 3, -2, 1]),
        S(aten.permute.default, "joint factor", "a0 a1 a2", split, [2, 0, 3, 1]),
        S(aten.permute.default, "joint factor used", "a0 a1 a2", split, [2, 0, 3, 1], then=used),
        S(aten.permute.default, "parameter", "a0 a1 a2", P(2, 7, 5), [1, 2, 0]),
        S(aten.transpose.int, "plain", "a0 a1 a2", X(2, 7, 5), 1, -1),
        S(aten.transpose.int, "of a vector", "a0", X(7), 0, 0),
        S(aten.unfold.default, "windows over space", "a1", X(2, 7, 9, axes=(1,)), 2, 4, 3),
        S(aten.unfold.default, "windows over channels", "a0", X(2, 7), 1, 4, 3),
        S(aten.gather.default, "tokens by number", "a2", X(2, 5, 7, axes=(2,)), 1,
          do(aten.expand.default, U(2, 3, 1, data=below(5)), [2, 3, 7])),
        S(aten.gather.default, "channels by number", "",
          X(2, 7, axes=(1,)), 1, U(2, 4, data=below(7))),
        S(aten.as_strided.default, "single sites strided anew", "a0 a1",
          X(2, 7, 1, 1, axes=(0, 1)), [2, 7, 1, 1], [7, 1, 7, 7]),
        S(aten.as_strided.default, "other positions", "", X(3, 7), [7, 3], [1, 7]),
        S(aten.transpose.int, "joint factor", "a0 a1 a2", split, 1, 2),
        S(aten.transpose_.default, "in place", "a0 a1 a2", X(2, 7, 5), 0, 1),
        S(aten.t.default, "matrix", "a0 a1", X(7, 5)),
        S(aten.t.default, "vector", "a0", X(7)),
        S(aten.t_.default, "in place", "a0 a1", X(7, 5)),
        S(aten.expand.default, "one axis", "a0 a1", X(2, 7, 1), [2, 7, 5]),
        S(aten.expand.default, "a new axis in front", "a0 a1", X(7, 5), [3, -1, 5]),
        S(aten.expand.default, "same size", "a0 a1", X(2, 7), [2, 7]),
        S(aten.expand.default, "joint factor", "a0 a1 a2", split, [3, 2, 3, 4, 5]),
        S(aten.mul.Tensor, "expanded meets labelled", "a0 a1 a2 b0 b2",
          X(2, 7, 5), do(aten.expand.default, X(2, 1, 5), [2, 7, 5])),
    ]


def pieces() -> list[Sample]:
    split = do(aten.view.default, X(2, 12, 5), [2, 3, 4, 5])
    chunk = aten.split.Tensor
    halves = do(chunk, X(2, 10, 3), 5, 1)
    uneven = do(aten.split_with_sizes.default, X(2, 10, 3), [3, 7], 1)
    return [
        S(aten.slice.Tensor, "a run", "a0 a1 a2", X(2, 11, 5), 1, 2, 7),
        S(aten.slice.Tensor, "open end", "a0 a1 a2", X(2, 11, 5), 1, 4, 9223372036854775807),
        S(aten.slice.Tensor, "from the end", "a0 a1 a2", X(2, 11, 5), -2, -5, -1),
        S(aten.slice.Tensor, "everything", "a0 a1 a2", X(2, 11, 5), 1, 0, 11),
        S(aten.slice.Tensor, "every third", "a0 a1 a2", X(2, 11, 5), 1, 1, 11, 3),
        S(aten.slice.Tensor, "one position", "a0 a1? a2", X(2, 11, 5), 1, 4, 5),
        S(aten.slice.Tensor, "nothing", "a0 a1 a2", X(2, 11, 5), 1, 4, 4),
        S(aten.slice.Tensor, "one position of a few", "a0 a1? a2", X(2, 3, 5), 1, 1, 3, 2),
        S(aten.slice.Tensor, "another axis", "a1", X(2, 11, 5, axes=(1,)), 2, 1, 3),
        S(aten.slice.Tensor, "blocks of a joint factor", "a0 a1 a2", split, 1, 0, 2, then=used),
        S(aten.slice.Tensor, "inside blocks of a joint factor", "a0 a1 a2",
          split, 2, 1, 3, then=used),
        S(aten.slice.Tensor, "parameter", "a0 a1", P(11, 5), 0, 2, 7),
        S(aten.add.Tensor, "two halves meet", "a0 a1 a2", Pick(halves, 0), Pick(halves, 1)),
        S(aten.select.int, "a channel", "a0 a1? a2", X(2, 7, 5), 1, 3),
        S(aten.select.int, "last site", "a1", X(2, 7, 5, axes=(1,)), -1, -1),
        S(aten.select.int, "a block of a joint factor", "a0 a1 a2", split, 1, 2),
        S(aten.select.int, "parameter", "a0? a1", P(3, 7), 0, 1),
        S(aten.unbind.int, "channels", "a0 a2", X(2, 3, 5), 1),
        S(aten.unbind.int, "sites", "a1", X(2, 7, 3, axes=(1,)), 2),
        S(aten.unbind.int, "blocks of a joint factor", "a0 a1 a2", split, 1),
        S(aten.cat.default, "unbound blocks joined in order", "a0 a1 a2",
          [Pick(do(aten.unbind.int, split, 1), k) for k in range(3)], 1),
        S(chunk, "a size", "a0 a1 a2", X(2, 11, 5), 4, 1),
        S(chunk, "a size, negative axis", "a0 a1 a2", X(2, 5, 11), 4, -1),
        S(chunk, "one part", "a0 a1 a2", X(2, 11, 5), 20, 1),
        S(chunk, "ones", "a0 a2", X(2, 3, 5), 1, 1),
        S(aten.add.Tensor, "parts of a joint factor meet", "a0 a1 a2",
          Pick(do(chunk, split, 2, 2), 0), Pick(do(chunk, split, 2, 2), 1)),
        S(aten.split.sizes, "sizes", "a0 a1 a2", X(2, 11, 5), [2, 6, 3], 1),
        S(aten.split_copy.Tensor, "a size", "a0 a1 a2", X(2, 11, 5), 4, 1),
        S(aten.unsafe_split.Tensor, "a size", "a0 a1 a2", X(2, 11, 5), 4, 1),
        S(aten.unsafe_chunk.default, "uneven", "a0 a1 a2", X(2, 11, 5), 3, 1),
        S(aten.split_with_sizes.default, "sizes", "a0 a1 a2", X(2, 11, 5), [2, 6, 3], 1),
        S(aten.split_with_sizes.default, "a part of one", "a0 a1? a2", X(2, 11, 5), [1, 7, 3], 1),
        S(aten.cat.default, "parts in another order", "a0 a1 a2",
          [Pick(uneven, 1), Pick(uneven, 0)], 1),
        S(aten.chunk.default, "uneven", "a0 a1 a2", X(2, 11, 5), 3, 1),
        S(aten.tensor_split.sections, "uneven", "a0 a1 a2", X(2, 11, 5), 3, 1),
        S(aten.tensor_split.indices, "indices", "a0 a1 a2", X(2, 11, 5), [2, 7], 1),
        S(aten.index_select.default, "permuted", "a0 a1 a2", X(2, 7, 5), 1, C([3, 0, 6, 2])),
        S(aten.index_select.default, "repeated", "a0 a1 a2", X(2, 7, 5), 1, C([3, 3, 0, 6])),
        S(aten.index_select.default, "one position", "a0 a1? a2", X(2, 7, 5), 1, C([3])),
        S(aten.index_select.default, "a buffer", "a0 a1 a2", X(2, 7, 5), 1, B(4, data=below(7))),
        S(aten.index_select.default, "from outside", "", X(2, 7, 5), 1, U(4, data=below(7))),
        S(aten.index_select.default, "another axis", "a1", X(2, 7, 5, axes=(1,)), 2, C([3, 0])),
        S(aten.index_select.default, "labelled index", "a1",
          X(7, 5, axes=(1,)), 0, X(3, data=below(7))),
        S(aten.index_select.default, "joint factor", "a0 a1 a2", split, 1, C([2, 0])),
        S(aten.index.Tensor, "permuted", "a0 a1 a2", X(2, 7, 5), [None, C([3, 0, 6, 2])]),
        S(aten.index.Tensor, "negative positions", "a0 a1 a2", X(2, 7, 5), [None, C([-1, 0, -3])]),
        S(aten.index.Tensor, "mask", "a0 a1 a2",
          X(2, 5, 3), [None, C([True, False, True, True, False])]),
        S(aten.index.Tensor, "two indices", "", X(5, 7, 3), [C([0, 1, 2]), C([3, 0, 6])]),
        S(aten.index.Tensor, "matrix index", "", X(2, 7, 5), [None, C([[3, 0], [6, 2]])]),
        S(aten.index.Tensor, "rows by an outside index", "a1",
          X(7, 5, axes=(1,)), [U(3, data=below(7))]),
        S(aten.embedding.default, "table", "a1", P(13, 7), U(2, 3, data=below(13))),
        S(aten.embedding.default, "table from outside", "a1",
          X(13, 7, axes=(1,)), U(3, data=below(13))),
        S(aten.embedding.default, "labelled rows", "a1", P(13, 7), X(2, 3, data=below(13))),
        S(aten.embedding.default, "rows in a buffer", "a1 b1?",
          P(13, 7), do(aten.slice.Tensor, B(1, 5, data=below(13)), 1, 0, 3)),
        S(aten.embedding.default, "computed table", "a1",
          do(aten.mul.Tensor, P(13, 7), P(13, 1)), U(2, 3, data=below(13))),
    ]


def arrangements() -> list[Sample]:
    split = do(aten.view.default, X(2, 12, 5), [2, 3, 4, 5])
    turned = do(aten.transpose.int, split, 1, 2)
    plain = do(aten.view.default, X(2, 12, 5, axes=(1,)), [2, 3, 4, 5])
    inside = do(aten.transpose.int, plain, 1, 2)
    back = aten.view.default
    x = X(2, 12, 5)
    late = do(aten.transpose.int, do(back, x, [2, 3, 4, 5]), 1, 2)
    late = do(aten.clone.default, late, memory_format=torch.contiguous_format)
    first, then = do(back, late, [2, 12, 5]), do(back, late, [2, 12, 5])
    written = do(aten.mul_.Tensor, x, 2.0)
    return [
        S(aten.cat.default, "of a shuffle whose source is written meanwhile", "a0 a1 a2",
          [first, written, then], 1),
        S(aten.flip.default, "channels", "a0 a1 a2", X(2, 7, 5), [1]),
        S(aten.flip.default, "two axes", "a0 a1 a2", X(2, 7, 5), [-1, 0]),
        S(back, "joint factor flipped in blocks", "a0 a1 a2",
          do(aten.flip.default, split, [2]), [2, 12, 5]),
        S(back, "joint factor flipped", "a0 a1 a2",
          do(aten.flip.default, split, [1, 2]), [2, 12, 5]),
        S(aten.roll.default, "channels", "a0 a1 a2", X(2, 7, 5), [2], [1]),
        S(aten.roll.default, "two axes", "", X(2, 7, 5, axes=(1,)), [2, 1], [1, 2]),
        S(aten.roll.default, "two labelled axes", "", X(2, 7, 5, axes=(1, 2)), [2, 1], [1, 2]),
        S(aten.roll.default, "sites", "a1", X(2, 7, 5, axes=(1,)), [2], [2]),
        S(aten.roll.default, "no axes", "", X(2, 7, 5), [3]),
        S(back, "joint factor rolled", "a0 a1 a2",
          do(aten.roll.default, split, [1], [1]), [2, 12, 5]),
        *(
            S(op, "inside a shuffle, another axis", "a1", inside, *arguments, then=merged)
            for op, *arguments in (
                (aten.flip.default, [3]),
                (aten.roll.default, [2], [3]),
                (aten.slice.Tensor, 3, 1, 4),
                (aten.index_select.default, 3, C([3, 0, 1])),
                (aten.constant_pad_nd.default, [1, 2]),
                (aten.select.int, 3, 2),
                (aten.repeat.default, [1, 1, 1, 2]),
                (aten.mean.dim, [3], True),
                (aten.relu.default,),
            )
        ),
        S(aten.flatten.using_ints, "of a shuffle", "a0 a1",
          do(aten.transpose.int, do(back, X(2, 12, 1), [2, 3, 4, 1]), 1, 2), 1),
        S(aten.roll.default, "inside a shuffle, a labelled axis", "a0 a1 a2",
          turned, [2], [3], then=merged),
        S(aten._to_copy.default, "inside a shuffle", "a1",
          inside, dtype=torch.float32, then=merged),
        S(aten.repeat.default, "channels", "a0 a1", X(2, 7), [1, 3]),
        S(aten.repeat.default, "a new axis", "a0 a1", X(2, 7), [3, 1, 2]),
        S(aten.repeat.default, "an axis of one", "a0 a2", X(2, 1, 7), [1, 5, 1]),
        S(aten.tile.default, "channels", "a0 a1", X(2, 7), [1, 3]),
        S(aten.tile.default, "fewer numbers than axes", "a0 a1 a2", X(3, 2, 7), [5]),
        S(aten.repeat_interleave.self_int, "channels", "a0 a1 a2", X(2, 7, 5), 3, 1),
        S(aten.repeat_interleave.self_int, "sites", "a1", X(2, 7, 5, axes=(1,)), 3, -1),
        S(aten.repeat_interleave.self_int, "negative axis", "a0 a1", X(2, 7), 3, -1),
        S(aten.repeat_interleave.self_int, "flattened", "", X(2, 7), 3),
        S(aten.repeat_interleave.self_Tensor, "a number each", "", X(2, 3), C([2, 1, 3]), 1),
        S(aten.repeat_interleave.Tensor, "positions", "", C([2, 1, 3])),
        S(aten.constant_pad_nd.default, "channels", "a0 a1 a2", X(2, 7, 5), [0, 0, 2, 3]),
        S(aten.constant_pad_nd.default, "sites", "a1", X(2, 7, 5, axes=(1,)), [2, 3], 1.5),
        S(aten.constant_pad_nd.default, "cropped", "a0 a1 a2", X(2, 11, 5), [0, 0, -2, -3]),
        S(aten.constant_pad_nd.default, "cropped and padded", "a0 a1 a2",
          X(2, 11, 5), [0, 0, -2, 3]),
        S(aten.constant_pad_nd.default, "all axes", "a0 a1 a2", X(2, 7, 5), [1, 0, 0, 2, 1, 1]),
        S(aten.constant_pad_nd.default, "an axis of one", "a0 a2", X(2, 1, 5), [0, 0, 0, 3]),
        S(aten.constant_pad_nd.default, "cropped to one", "a0 a1? a2", X(2, 3, 5), [0, 0, -1, -1]),
        S(aten.add.Tensor, "padded shortcut", "a0 a1 a2 b0 b1 b2",
          X(2, 11, 5), do(aten.constant_pad_nd.default, X(2, 7, 5), [0, 0, 2, 2])),
        S(aten.pixel_shuffle.default, "channels", "a0 a1", X(2, 12, 3, 5), 2),
        S(aten.pixel_shuffle.default, "no batch", "a0", X(12, 3, 5), 2),
        S(aten.pixel_shuffle.default, "to one channel", "a0", X(2, 4, 3, 5), 2),
        S(aten.pixel_unshuffle.default, "channels", "a0 a1", X(2, 3, 4, 6), 2),
        S(aten.pixel_unshuffle.default, "from one channel", "a0", X(2, 1, 4, 6, axes=(0,)), 2),
        S(aten.channel_shuffle.default, "channels", "a0 a1 a2 a3", X(2, 12, 3, 5), 3),
        S(aten.native_channel_shuffle.default, "channels", "a0 a1 a2 a3", X(2, 12, 3, 5), 4),
        S(aten.cat.default, "channels", "a0 a1 a2 b0 b1 b2", [X(2, 7, 5), X(2, 3, 5)], 1),
        S(aten.cat.default, "negative axis", "a0 a1 a2 b0 b1 b2", [X(2, 5, 7), X(2, 5, 3)], -1),
        S(aten.cat.default, "untracked member", "a1", [X(2, 7, 5), U(2, 3, 5)], 1),
        S(aten.cat.default, "member of one position", "a0 a1 a2 b0 b2",
          [X(2, 7, 5), X(2, 1, 5)], 1),
        S(aten.cat.default, "parameter", "a0 a1 b0 b1", [X(2, 7), P(2, 3)], 1),
        S(aten.cat.default, "another axis", "a0 a1 a2 b0 b1 b2", [X(2, 7, 5), X(2, 7, 3)], 2),
        S(aten.cat.default, "another axis, one untracked", "",
          [X(2, 7, 5, axes=(1,)), U(2, 7, 3)], 2),
        S(aten.cat.default, "empty member", "a0 a1 a2", [X(2, 7, 5), U(0)], 1),
        S(aten.cat.default, "joint factor", "a0 a1 a2", [split, split], 1),
        S(aten.stack.default, "in front", "a0 a1 b0 b1", [X(7, 5), X(7, 5)]),
        S(aten.stack.default, "behind", "a0 a1 b0 b1 c0 c1", [X(2, 7), X(2, 7), X(2, 7)], -1),
        S(aten.stack.default, "one untracked", "", [X(2, 7), U(2, 7)], 1),
        S(aten.stack.default, "parameters", "a0 a1 b0 b1", [P(7, 5), P(7, 5)], 1),
        S(aten.glu.default, "channels", "a0 a1 a2", X(2, 10, 3), 1),
        S(aten.glu.default, "last axis", "a0 a1 a2", X(2, 7, 4), -1),
        S(aten.glu.default, "of two positions", "a0 a1 a2", X(3, 2, 5), 1),
    ]


def factories() -> list[Sample]:
    x, like = X(2, 7, 5), {"defined": False}
    return [
        S(aten.zeros.default, "constant", "", [2, 7]),
        S(aten.ones.default, "constant", "", [2, 7]),
        S(aten.full.default, "constant", "", [2, 7], 1.5),
        S(aten.empty.memory_format, "constant", "", [2, 7], **like),
        S(aten.zeros.default, "nothing", "", [0, 7]),
        S(aten.new_zeros.default, "other sizes", "a0 a1 a2", x, [3, 11]),
        S(aten.new_ones.default, "other sizes", "a0 a1 a2", x, [3, 11]),
        S(aten.new_full.default, "other sizes", "a0 a1 a2", x, [3, 11], 1.5),
        S(aten.new_empty.default, "other sizes", "a0 a1 a2", x, [3, 11], **like),
        S(aten.cat.default, "zero padding", "a0 a1 a2",
          [x, do(aten.new_zeros.default, x, [2, 3, 5])], 1),
        S(aten.add.Tensor, "zeros meet labelled", "a0 a1 a2", x, do(aten.zeros.default, [2, 7, 5])),
    ]
