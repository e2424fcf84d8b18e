import bz2
import gzip
import lzma

import pytest
import zstandard

from core.data.formats import COMPRESSIONS, Format, find_variant, format_of, open_unpacked
from core.errors import UserError

PACK = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}  # fmt: skip
A, B = b"first part\n" * 400, b"second part\n" * 400


def unpacked(path) -> bytes:
    with open_unpacked(path) as (stream, _):
        return stream.read()


def test_names_say_the_format_in_any_case():
    assert format_of("dir/A.JSONL") == Format("json", "", "A")
    assert format_of("a.ndjson.GZ") == Format("json", ".gz", "a")
    assert format_of("c4.en.json.bz2") == Format("json", ".bz2", "c4.en")
    assert format_of("a.parquet") == Format("parquet", "", "a")
    assert format_of("wiki.raw.xz") == Format(None, ".xz", "wiki.raw")
    assert format_of("README") == Format(None, "", "README")
    assert format_of(".txt") == Format(None, "", ".txt")


@pytest.mark.parametrize("packed", COMPRESSIONS)
def test_streams_behind_one_another_are_read_to_the_end(tmp_path, packed):
    """What the command-line tools write when files are concatenated."""
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACK[packed](A) + PACK[packed](B))
    assert unpacked(path) == A + B
    path.write_bytes(PACK[packed](b""))
    assert unpacked(path) == b""


@pytest.mark.parametrize("packed", COMPRESSIONS)
def test_what_is_cut_short_or_followed_by_something_else_is_refused(tmp_path, packed):
    path = tmp_path / f"a.txt{packed}"
    whole = PACK[packed](A)
    second = bytearray(PACK[packed](B))
    second[1] ^= 0xFF  # in the second stream's magic bytes
    for content in (
        whole[:-5],
        whole[:3],
        whole + b"garbage",
        whole + bytes(second),
        b"plain text",
        whole + whole[:9],
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.txt\{packed} cannot be read: "):
            unpacked(path)


def test_zero_padding_between_xz_streams(tmp_path):
    """The .xz format allows it in multiples of four bytes (section 2.2), `xz -t` accepts it; two streams of
    300,000 bytes of it are longer than what is read at once."""
    path = tmp_path / "a.txt.xz"
    a, b = lzma.compress(A), lzma.compress(B)
    for n in (4, 8, 300_000):
        path.write_bytes(a + bytes(n) + b + bytes(n))
        assert unpacked(path) == A + B
    for content in (a + bytes(3) + b, a + bytes(4) + b"x" + b):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.txt\.xz cannot be read"):
            unpacked(path)


def test_long_windows_of_zst(tmp_path):
    """Beyond the 128 MiB (2^27) that decompressors allow unless told: `zstd --long=28`."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown length
    packed = packer.compress(A) + packer.flush()
    assert zstandard.get_frame_parameters(packed).window_size == 1 << 28
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert unpacked(tmp_path / "a.jsonl.zst") == A


def test_skippable_frames_of_zst(tmp_path):
    """They hold what other programs keep beside the text (pzstd, seekable zstd)."""
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    (tmp_path / "a.txt.zst").write_bytes(skippable + PACK[".zst"](A) + skippable)
    assert unpacked(tmp_path / "a.txt.zst") == A


def test_what_is_no_file_is_named(tmp_path):
    for path, why in ((tmp_path / "missing.txt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"cannot be read: {why}"):
            unpacked(path)


def test_another_suffix_of_the_same_form_is_found(tmp_path):
    assert find_variant(tmp_path / "none" / "a.jsonl") is None
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").touch()
    assert find_variant(tmp_path / "a.jsonl") is None
    (tmp_path / "a.JSON.gz").touch()
    assert find_variant(tmp_path / "a.jsonl") == tmp_path / "a.JSON.gz"
    (tmp_path / "a.jsonl").touch()
    assert find_variant(tmp_path / "a.jsonl") == tmp_path / "a.jsonl"
