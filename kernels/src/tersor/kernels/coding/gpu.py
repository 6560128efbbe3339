"""What the coders' GPU bodies share."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import triton
import triton.language as tl


@triton.jit
def code_of(stream, group, lane, inside, BITS: tl.constexpr):
    """Codes of `BITS` bits from the masks of 64 bits of their groups."""
    code = tl.zeros(inside.shape, tl.int32)
    for j in tl.static_range(BITS):
        byte = tl.load(stream + (group * BITS + j) * 8 + lane // 8, mask=inside, other=0).to(tl.int32)
        code |= ((byte >> (lane % 8)) & 1) << j
    return code


@triton.jit
def rank_of(chosen):
    """(GROUPS, 64): how many of the chosen (1, else 0) come before each in the order of rows."""
    within = tl.cumsum(chosen, 1)
    row = tl.sum(chosen, 1)
    return (tl.cumsum(row, 0) - row)[:, None] + within - chosen
