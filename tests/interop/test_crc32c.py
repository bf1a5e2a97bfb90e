import numpy as np
import pytest

from gptsmith.interop.crc32c import crc32c


@pytest.mark.parametrize(
    ("data", "checksum"),
    [  # RFC 3720, B.4, and the value by which catalogues of CRCs are told apart
        (b"", 0),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
    ],
)
def test_published_values(data: bytes, checksum: int) -> None:
    assert crc32c(data) == checksum


def bit_by_bit(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def test_every_length_around_the_stretches() -> None:
    data = np.random.default_rng(0).integers(0, 256, 1300, np.uint8).tobytes()
    for length in [*range(10), *range(250, 262), *range(508, 518), 1023, 1024, 1025, 1300]:
        assert crc32c(data[:length]) == bit_by_bit(data[:length]), length


def test_data_of_several_parts() -> None:
    """Longer than the 16 MiB that run side by side: appending a checksum leaves the residue."""
    data = np.random.default_rng(1).integers(0, 256, (1 << 24) + 4321, np.uint8)
    checksum = np.array([crc32c(data)], "<u4").view(np.uint8)
    assert crc32c(np.concatenate([data, checksum])) == 0x48674BC7
