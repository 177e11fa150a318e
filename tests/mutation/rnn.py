"""Bugs to plant in LSTM, GRU and RNN."""

from mutation import Mutation

RNN_MODULES = "tests/test_rnn_modules.py"
RNN_INSIDE = "tests/test_rnn_torch.py"
OPS = "python/fastdl/ops/"
RNN = "csrc/rnn/cpu/kernel.h"
RNN_RUN = "csrc/rnn/cpu/run.cc"
RNN_PRODUCT = "csrc/rnn/cpu/product.h"
RNN_TILES = "csrc/rnn/cpu/kernel_amx.h"
RNN_TESTS = "tests/test_rnn_native.py"
RNN_SPLIT = "tests/test_rnn_split.py"

MUTATIONS = [
    Mutation(
        "weight gradient of a reverse direction with the states of a forward one",
        OPS + "rnn_native.py",
        "    before = y[piece.start + 1 : piece.stop + 1] if reverse else ",
        "    before = ",
        f"{RNN_MODULES} -k 'test_layers and batched and bidirectional'",
    ),
    Mutation(
        "weight gradient without the first state",
        OPS + "rnn_native.py",
        "        if h0 is not None and first.shape[0]:",
        "        if False:",
        f"{RNN_MODULES} -k 'test_layers and batched and states'",
    ),
    Mutation(
        "states before a packed step taken from its own",
        OPS + "rnn_native.py",
        "torch.repeat_interleave(batch_sizes[:-1], batch_sizes[1:])",
        "torch.repeat_interleave(batch_sizes[1:], batch_sizes[1:])",
        f"{RNN_MODULES} -k 'test_layers and packed'",
    ),
    Mutation(
        "recurrent bias of a GRU with the gradient of the other",
        OPS + "rnn_native.py",
        "            if gates.recurrent is not None:",
        "            if False:",
        f"{RNN_MODULES} -k 'test_layers and gru'",
    ),
    Mutation(
        "pieces of time that all start from the first state",
        OPS + "rnn_native.py",
        "        h, c = y[_last_step(piece, reverse)], c_next\n",
        "",
        "tests/test_rnn_pieces.py -k 'lstm or two_ways'",
    ),
    Mutation(
        "gradients of the states not carried from piece to piece",
        OPS + "rnn_native.py",
        "        dh, dc = dh_before, dc_before\n",
        "",
        "tests/test_rnn_pieces.py -k 'lstm or two_ways'",
    ),
    Mutation(
        "packed states left in the order of length",
        "python/fastdl/nn/recurrent.py",
        "        h_n = _permuted(h_n, unsorted_indices)\n",
        "",
        f"{RNN_MODULES} -k 'test_layers and unsorted'",
    ),
    Mutation(
        "shapes of parameters not looked at",
        OPS + "rnn_shapes.py",
        "    return [x.shape for x in parameters] == expected",
        "    return True",
        f"{RNN_MODULES} -k test_wrongly_shaped_parameters",
    ),
    Mutation(
        "second gate's derivative in the reference of GRU",
        OPS + "rnn_reference.py",
        "dz = dh * (s.h_before - n) * z * (1 - z)",
        "dz = dh * (s.h_before - n) * z",
        f"{RNN_INSIDE} -k test_gradcheck",
    ),
    Mutation(
        "mapped batch unfolded the wrong way round",
        OPS + "rnn_library.py",
        "x.transpose(0, 1).flatten(1, 2)",
        "x.transpose(0, 1).transpose(1, 2).flatten(1, 2)",
        f"{RNN_INSIDE} -k test_vmap",
    ),
    Mutation(
        "h read from the buffer being written",
        RNN_RUN,
        "const Operand &before = h[s & 1], &after = h[~s & 1];",
        "const Operand &before = h[s & 1], &after = h[s & 1];",
        f"{RNN_TESTS} -k test_tails",
    ),
    Mutation(
        "no barrier at the end of a step",
        RNN_RUN,
        "      finish_rows(clock.next_size(), m, after, units, columns);\n      barrier.wait(threads);",
        "      finish_rows(clock.next_size(), m, after, units, columns);",
        f"{RNN_TESTS} -k test_same_bits",
    ),
    Mutation(
        "last states of ended rows not written",
        RNN_RUN,
        "for (i64 i = begin; i < end; ++i) {\n      if (args.h_n)",
        "for (i64 i = begin; i < end && begin == 0; ++i) {\n      if (args.h_n)",
        f"{RNN_TESTS} -k test_packed",
    ),
    Mutation(
        "rows that join start from the step before",
        RNN_RUN,
        "const i64 shared = s + 1 < d.T ? std::min(m, before.size()) : 0;",
        "const i64 shared = s + 1 < d.T ? m : 0;",
        f"{RNN_TESTS} -k test_packed",
    ),
    Mutation(
        "dropped K blocks of the recurrent product",
        RNN_PRODUCT,
        "    t.accumulate = accumulate || k > 0;\n    for (i64 i = 0; i < tiles; ++i) {",
        "    t.accumulate = accumulate;\n    for (i64 i = 0; i < tiles; ++i) {",
        f"{RNN_TESTS} -k test_depths",
    ),
    Mutation(
        "cell gradient forgets the later steps",
        RNN,
        "const auto dc = E::add(lanes.load(dc_at), through_tanh(E::mul(dh, out), t));",
        "const auto dc = through_tanh(E::mul(dh, out), t);",
        f"{RNN_TESTS} -k test_tails",
    ),
    Mutation(
        "gru's recurrent gradient without the reset gate",
        RNN,
        "        lanes.store(recurrent + 2 * a.H + j, d_r);",
        "        lanes.store(recurrent + 2 * a.H + j, d_fresh);",
        f"{RNN_TESTS} -k test_tails",
    ),
    Mutation(
        "columns past H packed from other gates",
        RNN,
        "const int n = left < 0 ? 0 : left < W ? static_cast<int>(left) : W;",
        "const int n = left < 0 ? 0 : W;",
        f"{RNN_TESTS} -k test_guard_pages",
    ),
    Mutation(
        "largest magnitudes of a step's gradients not told",
        RNN_RUN,
        "x.peaks ? x.peaks + thread * d.B : nullptr);",
        "x.peaks && thread < 0 ? x.peaks : nullptr);",
        f"{RNN_SPLIT} -k test_vanishing",
    ),
    Mutation(
        "sums of tiles of parts replace what they are added to",
        RNN_PRODUCT,
        "to[v] = accumulate ? to[v] + from[v] : from[v];",
        "to[v] = from[v];",
        f"{RNN_TESTS} -k 'test_tails and gru_f32_split'",
    ),
    Mutation(
        "sums that parts get wrong left in a projection",
        RNN_PRODUCT,
        "    repair(a, w, column_peaks + column + j, 0, m,",
        "    repair(a, w, column_peaks + column + j, 0, m * 0,",
        f"{RNN_SPLIT} -k test_projections",
    ),
    Mutation(
        "columns of the first gate computed again for all",
        RNN_PRODUCT,
        "(gates ? within / units * count : 0) + first",
        "first",
        f"{RNN_SPLIT} -k test_special_weights",
    ),
    Mutation(
        "parts of all gates' gradients in the place of the first's",
        RNN_TILES,
        "+ s * a.H + j, mask,",
        "+ j, mask,",
        f"{RNN_TESTS} -k 'test_tails and lstm_f32_split'",
    ),
    Mutation(
        "recurrent layers as exact as matmul is asked to be",
        "csrc/bind/rnn.cc",
        "    desc.precision = asked_precision(desc.dtype, Switch::rnn);",
        "    desc.precision = asked_precision(desc.dtype, Switch::matmul);",
        f"{RNN_SPLIT} -k test_switch",
    ),
]
