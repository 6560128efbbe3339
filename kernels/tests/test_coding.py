"""The entropy coders: what a decoder returns is what the encoder got, in every body, and damage never passes or crashes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.kernels import backend
from tersor.kernels.fixed_planes import fixed_planes_decode, fixed_planes_encode
from tersor.kernels.planes import plane_split
from tersor.kernels.prefix6 import code, code_lengths, prefix6_decode, prefix6_encode
from tersor.kernels.rans11 import frequencies, rans11_decode, rans11_encode
from tersor.kernels.tiered import tiered_decode, tiered_encode, tiered_offsets

CODERS = {
    "tiered": (tiered_encode, tiered_decode),
    "fixed_planes": (fixed_planes_encode, fixed_planes_decode),
    "prefix6": (prefix6_encode, prefix6_decode),
    "rans11": (rans11_encode, rans11_decode),
}
ON_GPU = ("tiered", "fixed_planes")  # and there the decoder alone
LENGTHS = [0, 1, 63, 64, 127, 128, 129, 1000]


def exponents(n: int, generator) -> Tensor:
    """Of weights as training leaves them: normal, with another scale for each row."""
    scale = torch.rand(-(-n // 100), 1, generator=generator).mul(2).sub(6).exp2()
    return plane_split((scale * torch.randn(1, 100, generator=generator)).bfloat16())[0].flatten()[:n].contiguous()


DISTRIBUTIONS = {
    "one symbol": lambda n, g: torch.full((n,), 255),
    "two symbols": lambda n, g: torch.randint(0, 2, (n,), generator=g) * 255,
    "uniform": lambda n, g: torch.randint(0, 256, (n,), generator=g),
    "geometric": lambda n, g: torch.empty(n).geometric_(0.4, generator=g).clamp(max=255),
    "ends": lambda n, g: torch.randint(0, 12, (n,), generator=g).sub(6).remainder(256),
    "rising": lambda n, g: torch.arange(n) % 256,
    "exponents": exponents,
}


def symbols(distribution: str, n: int, generator) -> Tensor:
    return DISTRIBUTIONS[distribution](n, generator).to(torch.uint8)


@pytest.fixture(params=CODERS)
def coder(request):
    return CODERS[request.param]


def encoded(encode, s: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    with backend("reference"):
        return encode(s, *args)


def skip_absent(body: str, decode) -> None:
    if body == "gpu" and decode not in [CODERS[name][1] for name in ON_GPU]:
        pytest.skip("has no GPU body")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_decoded_is_what_was_encoded(body, coder, generator, distribution):
    encode, decode = coder
    skip_absent(body, decode)
    for n in LENGTHS:
        s = symbols(distribution, n, generator)
        coded = encoded(encode, s)
        if body != "gpu":
            for ours, reference in zip(encode(s), coded, strict=True):
                assert torch.equal(ours, reference)
        decoded = decode(*coded, n)
        assert decoded.shape == (n,)
        assert torch.equal(decoded, s)
        if n == 0:
            assert [t.numel() for t in coded] == [0, 0, 0]


@pytest.mark.parametrize("bits", [3, 4])
def test_fixed_planes_of_either_width(body, generator, bits):
    for distribution in DISTRIBUTIONS:
        s = symbols(distribution, 1000, generator)
        coded = encoded(fixed_planes_encode, s, bits)
        if body != "gpu":
            assert all(map(torch.equal, fixed_planes_encode(s, bits), coded))
        assert coded[1].numel() == 1024 // 8 * bits
        assert torch.equal(fixed_planes_decode(*coded, 1000), s)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    coder=st.sampled_from(list(CODERS.values())),
    n=st.integers(0, 700),
    alphabet=st.lists(st.integers(0, 255), min_size=1, max_size=40),
    skew=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_bodies_agree_on_any_alphabet(coder, n, alphabet, skew, seed):
    encode, decode = coder
    g = torch.Generator().manual_seed(seed)
    index = (torch.rand(n, generator=g) ** (1 + skew) * len(alphabet)).long()
    s = torch.tensor(alphabet, dtype=torch.uint8)[index]
    coded = encoded(encode, s)
    assert all(map(torch.equal, encode(s), coded))
    assert torch.equal(decode(*coded, n), s)
    with backend("reference"):
        assert torch.equal(decode(*coded, n), s)


def test_long_enough_for_every_path(coder, generator):
    encode, decode = coder
    s = exponents(50_001, generator)
    before = s.clone()
    assert torch.equal(decode(*encode(s), len(s)), before)
    assert torch.equal(s, before)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_tiers_in_vectors_of_both_lengths(vectors, generator, guarded, distribution):
    for n in (1, 64, 129, 9000):
        s = symbols(distribution, n, generator)
        assert torch.equal(tiered_decode(*map(guarded, encoded(tiered_encode, s)), n), s)


def test_shapes_and_strides(body, coder, generator):
    encode, decode = coder
    skip_absent(body, decode)
    s = symbols("exponents", 600, generator).view(20, 30)
    coded = encoded(encode, s)
    assert all(map(torch.equal, encoded(encode, s.T.contiguous().T), coded))
    if body == "cpu":
        assert all(map(torch.equal, encode(s.T.contiguous().T), coded))
    strided = [torch.stack([t, ~t], -1)[..., 0] for t in coded]
    assert torch.equal(decode(*strided, 600), s.flatten())


def test_nothing_outside_is_read_or_written(body, coder, generator, guarded):
    encode, decode = coder
    skip_absent(body, decode)
    for distribution in ("exponents", "uniform"):
        s = symbols(distribution, 300, generator)
        coded = encoded(encode, s)
        if body != "gpu":
            assert all(map(torch.equal, encode(guarded(s)), coded))
        assert torch.equal(decode(*map(guarded, coded), 300), s)


def damaged(coded: list[Tensor], generator) -> list[Tensor]:
    """A bit flipped, an end cut off or bytes appended, in one of the tensors."""
    which = int(torch.randint(0, 3, (), generator=generator))
    t, how = coded[which].clone(), int(torch.randint(0, 4, (), generator=generator))
    if how < 2 and t.numel():
        t[int(torch.randint(0, t.numel(), (), generator=generator))] ^= 1 << int(
            torch.randint(0, 8, (), generator=generator)
        )
    elif how == 2:
        t = t[: int(torch.randint(0, t.numel() + 1, (), generator=generator))]
    else:
        t = torch.cat([t, t.new_zeros(1 + how)])
    return [t if i == which else other for i, other in enumerate(coded)]


def outcome(decode, coded: list[Tensor], n: int) -> list[int] | str:
    """The symbols, or why there are none."""
    try:
        return decode(*coded, n).tolist()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("distribution", ["exponents", "uniform"])
def test_damage_is_refused_or_harmless(body, coder, generator, guarded, distribution):
    encode, decode = coder
    skip_absent(body, decode)
    s = symbols(distribution, 500, generator)
    coded = list(encoded(encode, s))
    name = f"{decode.__name__}: the coded data is damaged: "
    refused = 0
    for _ in range({"cpu": 200, "reference": 60, "gpu": 8}[body]):
        bad = damaged(coded, generator)
        same_sizes = all(a.numel() == b.numel() for a, b in zip(bad, coded))
        answer = outcome(decode, list(map(guarded, bad)), 500)
        if isinstance(answer, str):
            refused += 1
            assert answer.startswith(name)
        else:
            assert same_sizes
            assert len(answer) == 500
    assert refused


def test_bodies_agree_on_what_is_damaged(coder, generator):
    encode, decode = coder
    s = symbols("exponents", 300, generator)
    coded = list(encode(s))

    for _ in range(40):
        bad = damaged(coded, generator)
        ours = outcome(decode, bad, 300)
        with backend("reference"):
            assert outcome(decode, bad, 300) == ours


@pytest.mark.parametrize("n", [0, 1, 299, 301, 10_000])
def test_another_number_of_symbols_is_refused(coder, generator, n):
    encode, decode = coder
    coded = encode(symbols("exponents", 256, generator))
    with pytest.raises(ValueError, match=rf"{decode.__name__}: the coded data is damaged: "):
        decode(*coded, n)
    with pytest.raises(ValueError, match=rf"{decode.__name__}: n must not be negative, got -1"):
        decode(*coded, -1)


def test_bad_arguments_are_named(coder):
    encode, decode = coder
    of = decode.__name__
    with pytest.raises(TypeError, match=rf"{encode.__name__}: symbols must be uint8, got torch.bfloat16"):
        encode(torch.zeros(3, dtype=torch.bfloat16))
    nothing = torch.zeros(0, dtype=torch.uint8)
    with pytest.raises(TypeError, match=f"{of}: stream must be uint8, got torch.int64"):
        decode(nothing, nothing.long(), nothing, 0)
    with pytest.raises(ValueError, match=rf"{of}: side must have one dimension, got the shape \(0, 2\)"):
        decode(nothing, nothing, nothing.view(0, 2), 0)
    with pytest.raises(ValueError, match=f"{of}: stream is on meta, but table is on cpu"):
        decode(nothing, nothing.to("meta"), nothing, 0)
    with pytest.raises(ValueError, match="fixed_planes_encode: bits must be 3 or 4, got 5"):
        fixed_planes_encode(nothing, 5)


def test_registration_is_sound(coder, generator):
    encode, decode = coder
    s = symbols("exponents", 200, generator)
    torch.library.opcheck(getattr(torch.ops.tersor, encode.__name__).default, (s,))
    torch.library.opcheck(getattr(torch.ops.tersor, decode.__name__).default, (*encode(s), 200))


def test_compiles_into_one_graph(coder, generator):
    encode, decode = coder
    s = symbols("exponents", 200, generator)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        there_and_back = torch.compile(lambda s: decode(*encode(s), 200) + 1, fullgraph=True, backend="eager")
        assert torch.equal(there_and_back(s), s + 1)


def size(coded) -> int:
    return sum(t.numel() for t in coded)


def entropy_bytes(s: Tensor) -> float:
    p = torch.bincount(s.flatten(), minlength=256).double() / s.numel()
    return -float((p * p.clamp(min=1e-300).log2()).sum()) * s.numel() / 8


def test_sizes_of_real_looking_exponents(generator):
    s = exponents(2**17, generator)
    bound = entropy_bytes(s)
    assert bound <= size(rans11_encode(s)) <= 1.01 * bound
    # what 6 bits per code, 2 + 4 bits, and 3 bits cost on top
    assert size(prefix6_encode(s)) <= 1.06 * bound
    assert size(tiered_encode(s)) <= 1.25 * bound
    assert size(fixed_planes_encode(s)) <= 1.3 * bound


def test_sizes_of_the_zoos_weights(tiny_lm_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(tiny_lm_path / "model.safetensors").values()
    s = torch.cat([plane_split(w.bfloat16().flatten())[0] for w in weights if w.dim() == 2])[: 2**20]
    bound = entropy_bytes(s)
    assert size(rans11_encode(s)) <= 1.005 * bound
    assert size(prefix6_encode(s)) <= 1.06 * bound


def test_frequencies_add_up_and_favour_none():
    for counts in ([1] * 256, [10**9] + [1] * 255, [0] * 255 + [1], [3, 1] + [0] * 254, [2**i for i in range(40)]):
        counts = counts + [0] * (256 - len(counts))
        f = frequencies(counts)
        assert sum(f) == 2048
        assert [x > 0 for x in f] == [x > 0 for x in counts]
        # no exchange of one unit shortens the code
        bits = [[c * math.log2(x + d) if x + d > 0 else 0 for c, x in zip(counts, f)] for d in (-1, 0, 1)]
        gains = [more - now for now, more in zip(bits[1], bits[2])]
        losses = [now - less for now, less, x in zip(bits[1], bits[0], f) if x > 1]
        assert not losses or max(gains) <= min(losses) * (1 + 1e-9)


def brute_force_cost(weights: list[int]) -> int:
    """Of the best lengths 1 to 6 with Kraft sum 1, over all of them: weights ascend, so lengths descend."""
    best = [10**9]

    def extend(i: int, longest: int, left: int, cost: int) -> None:
        if i == len(weights):
            best[0] = min(best[0], cost) if left == 0 else best[0]
            return
        for length in range(longest, 0, -1):
            if 64 >> length <= left:
                extend(i + 1, length, left - (64 >> length), cost + weights[i] * length)

    extend(0, 6, 64, 0)
    return best[0]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=8))
def test_code_lengths_are_the_best(weights):
    weights.sort()
    lengths = code_lengths(weights)
    assert sum(64 >> length for length in lengths) == 64
    assert all(1 <= length <= 6 for length in lengths)
    assert sum(w * length for w, length in zip(weights, lengths)) == brute_force_cost(weights)


def test_longest_codes_have_6_bits():
    escape, entries = code([2**i for i in range(30)] + [0] * 226)
    assert max(length for length, _ in entries) == 6
    assert code_lengths([1] * 64) == [6] * 64
    assert escape in {symbol for _, symbol in entries}


def test_tables_that_no_encoder_writes_are_refused(body, generator):
    if body == "gpu":
        pytest.skip("has no GPU body")
    s = symbols("exponents", 1000, generator)
    table, stream, side = prefix6_encode(s)
    table[5] -= 1
    with pytest.raises(ValueError, match="prefix6_decode: .*: the Kraft sum of the codes is "):
        prefix6_decode(table, stream, side, 1000)
    table, stream, side = rans11_encode(s)
    table[32] += 1
    with pytest.raises(ValueError, match="rans11_decode: .*: the frequencies add up to 2049 instead of 2048"):
        rans11_decode(table, stream, side, 1000)
    table, stream, side = rans11_encode(s)
    with pytest.raises(ValueError, match="rans11_decode: .*: the words of the stream do not lead back"):
        rans11_decode(table, stream[:-2], side, 1000)


def test_offsets_let_parts_be_decoded_alone(generator):
    s = symbols("uniform", 1000, generator)
    table, stream, side = tiered_encode(s)
    nibble_bytes = int.from_bytes(bytes(table[4:8].tolist()), "little")
    nibbles, raw = side[:nibble_bytes], side[-(-nibble_bytes // 64) * 64 :]
    offsets = tiered_offsets(table, stream, side, 1000, 128)
    assert offsets.shape == (8, 2)
    ends = [*offsets[1:].tolist(), [len(nibbles), len(raw)]]
    for i, ((nibble, byte), (nibble_end, byte_end)) in enumerate(zip(offsets.tolist(), ends)):
        part = raw[byte:byte_end]
        sizes = torch.tensor([nibble_end - nibble, len(part)], dtype=torch.int32).view(torch.uint8)
        part_nibbles = torch.nn.functional.pad(nibbles[nibble:nibble_end], (0, -(nibble_end - nibble) % 64))
        own = torch.cat([table[:4], sizes]), stream[32 * i : 32 * (i + 1)], torch.cat([part_nibbles, part])
        expected = s[128 * i : 128 * (i + 1)]
        assert torch.equal(tiered_decode(*own, len(expected)), expected)
    for length in (0, 100):
        with pytest.raises(ValueError, match=f"length must be a multiple of 64, got {length}"):
            tiered_offsets(table, stream, side, 1000, length)


def test_processors_without_a_deposit_instruction():
    cpu = pytest.importorskip("tersor.kernels.coding.cpu")
    for nibbles in (0x123456789ABCDEF0, 2**64 - 1, 0):
        for lanes in (cpu.SPREAD[0b10110010], cpu.SPREAD[0xFF], cpu.SPREAD[0]):
            left, expected = nibbles, 0
            for i in range(8):
                if int(lanes) >> 8 * i & 1:
                    expected |= (left & 15) << 8 * i
                    left >>= 4
            assert cpu._spread_one_by_one(cpu.u64(nibbles), lanes) == expected
            assert cpu.spread_nibbles(cpu.u64(nibbles), lanes) == expected
