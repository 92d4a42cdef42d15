"""Which expert gets which token, on the GPU alone: nothing is read back, so that a CUDA graph can hold it all.

``choose`` picks the experts of each token; ``count``, ``divide`` and ``place`` sort the pairs (token, choice) by expert
and cut each expert's into blocks for ``matmul.py``; ``combine`` adds up what a token's experts made of it.
"""

import triton
import triton.language as tl


@triton.jit
def choose(
    logits,
    bias,
    ids,
    weights,
    E,
    logits_stride,
    factor,
    SCORING: tl.constexpr,
    BIAS: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_OF_GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Router logits [T, E] of one token -> ids int32 [T, TOP_K], weights float32 [T, TOP_K]; ties to the lower id.

    SCORING: "softmax" over all experts, "sigmoid", or "chosen" (softmax over the chosen ones alone). ``bias`` [E]
    counts for the choice, not for the weight. GROUPS > 1: only experts of the TOP_GROUPS best groups can be chosen; a
    group is as good as its BEST_OF_GROUP best experts together. NORMALIZE: weights are divided by their sum + EPSILON.
    """
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    there = expert < E
    logit = tl.load(logits + token * logits_stride + expert, mask=there, other=float("-inf")).to(tl.float32)
    if SCORING == "softmax":
        raised = tl.exp(logit - tl.max(logit, axis=0))
        score = raised / tl.sum(raised, axis=0)
    elif SCORING == "sigmoid":
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        score = logit
    choice = score
    if BIAS:
        choice += tl.load(bias + expert, mask=there, other=0.0).to(tl.float32)
    choice = tl.where(there, choice, float("-inf"))
    if GROUPS > 1:
        size = E // GROUPS
        group = expert // size
        worth = tl.full((BLOCK_E,), float("-inf"), tl.float32)
        for index in tl.static_range(GROUPS):
            inside = tl.where(group == index, choice, float("-inf"))
            total = 0.0
            for _ in tl.static_range(BEST_OF_GROUP):
                best = tl.max(inside, axis=0)
                total += best
                first = tl.min(tl.where(inside == best, expert, BLOCK_E), axis=0)
                inside = tl.where(expert == first, float("-inf"), inside)
            worth = tl.where(expert == index, total, worth)
        kept = tl.zeros((BLOCK_E,), tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            best = tl.max(worth, axis=0)
            first = tl.min(tl.where(worth == best, expert, BLOCK_E), axis=0)
            kept = tl.where(group == first, 1, kept)
            worth = tl.where(expert == first, float("-inf"), worth)
        choice = tl.where(kept == 1, choice, float("-inf"))
    lane = tl.arange(0, BLOCK_E)
    chosen_id = tl.zeros((BLOCK_E,), tl.int32)
    chosen_weight = tl.zeros((BLOCK_E,), tl.float32)
    for index in tl.static_range(TOP_K):
        best = tl.max(choice, axis=0)
        first = tl.min(tl.where(choice == best, expert, BLOCK_E), axis=0)
        own = tl.sum(tl.where(expert == first, score, 0.0), axis=0)
        chosen_id = tl.where(lane == index, first, chosen_id)
        chosen_weight = tl.where(lane == index, own, chosen_weight)
        choice = tl.where(expert == first, float("-inf"), choice)
    taken = lane < TOP_K
    if SCORING == "chosen":
        top = tl.max(tl.where(taken, chosen_weight, float("-inf")), axis=0)
        chosen_weight = tl.where(taken, tl.exp(chosen_weight - top), 0.0)
        chosen_weight = chosen_weight / tl.sum(chosen_weight, axis=0)
    if NORMALIZE:
        chosen_weight = chosen_weight / (tl.sum(tl.where(taken, chosen_weight, 0.0), axis=0) + EPSILON)
    chosen_weight = chosen_weight * factor
    tl.store(ids + token * TOP_K + lane, chosen_id, mask=taken)
    tl.store(weights + token * TOP_K + lane, chosen_weight, mask=taken)


@triton.jit
def count(ids, counts, pairs, E, BLOCK: tl.constexpr):
    """``counts`` int32 [E], zeros before: how many pairs each expert has. Ids beyond E belong to no expert."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + pair, mask=pair < pairs, other=-1)
    valid = (expert >= 0) & (expert < E)
    tl.atomic_add(counts + expert, 1, mask=valid, sem="relaxed")


@triton.jit
def divide(
    counts, cursors, block_expert, block_begin, block_rows, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """One program per block: its expert (-1: none), where its pairs begin, and how many they are. The first one also
    writes where each expert's pairs begin (``cursors`` int32 [E])."""
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    there = expert < E
    number = tl.load(counts + expert, mask=there, other=0)
    blocks = (number + BLOCK_M - 1) // BLOCK_M
    last_block = tl.cumsum(blocks, axis=0)
    begin = tl.cumsum(number, axis=0) - number
    if block == 0:
        tl.store(cursors + expert, begin, mask=there)
    mine = tl.sum(((last_block <= block) & there).to(tl.int32), axis=0)
    if mine >= E:
        tl.store(block_expert + block, -1)
    else:
        selected = expert == mine
        within = block - tl.sum(tl.where(selected, last_block - blocks, 0), axis=0)
        first = tl.sum(tl.where(selected, begin, 0), axis=0) + within * BLOCK_M
        rows = tl.sum(tl.where(selected, number, 0), axis=0) - within * BLOCK_M
        tl.store(block_expert + block, mine)
        tl.store(block_begin + block, first)
        tl.store(block_rows + block, tl.minimum(rows, BLOCK_M))


@triton.jit
def place(ids, cursors, order, pairs, E, BLOCK: tl.constexpr):
    """``order`` int32 [pairs]: the pairs by expert. Which of an expert's pairs comes first is left to chance: every one
    is a row of its own in what follows."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + pair, mask=pair < pairs, other=-1)
    valid = (expert >= 0) & (expert < E)
    position = tl.atomic_add(cursors + expert, 1, mask=valid, sem="relaxed")
    tl.store(order + position, pair, mask=valid)


@triton.jit
def combine(outputs, ids, result, E, H, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Outputs of pairs [T * TOP_K, H], weighted already -> result [T, H]; in the order of choices, in float32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    for index in tl.static_range(TOP_K):
        expert = tl.load(ids + token * TOP_K + index)
        if (expert >= 0) & (expert < E):
            line = outputs + (token * TOP_K + index) * H
            total += tl.load(line + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + token * H + column, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def block_of(
    order,
    block_expert,
    block_begin,
    block_rows,
    rows,
    N,
    ROUTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """What a program of a product works on: its expert (-1: none), block of columns, rows [BLOCK_M] and which are real.

    Programs that run together share blocks of weights and of inputs: GROUP_M blocks of rows go through all columns."""
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_m = tl.num_programs(0) // blocks_n
    in_group = GROUP_M * blocks_n
    first_m = pid // in_group * GROUP_M
    size_m = tl.minimum(blocks_m - first_m, GROUP_M)
    block_m = first_m + (pid % in_group) % size_m
    block_n = (pid % in_group) // size_m
    lanes = tl.arange(0, BLOCK_M)
    if ROUTED:
        expert = tl.load(block_expert + block_m).to(tl.int64)
        # Of no expert: nothing was written there.
        there = expert >= 0
        begin = tl.load(block_begin + block_m, mask=there, other=0)
        valid = lanes < tl.load(block_rows + block_m, mask=there, other=0)
        row = tl.load(order + begin + lanes, mask=valid, other=0).to(tl.int64)
    else:
        expert = tl.zeros((), tl.int64)
        lanes = block_m * BLOCK_M + lanes
        valid = lanes < rows
        row = tl.where(valid, lanes, 0).to(tl.int64)
    return expert, block_n, row, valid
