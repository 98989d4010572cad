"""Colour profiles made by hand, as the ICC specification (version 4) lays them out, for what no library here writes."""

import struct

import numpy as np

# Display P3 (SMPTE RP 431-2 primaries, white D65) adapted to the profile connection space's D50 by Bradford.
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
D50 = (0.9642, 1.0, 0.8249)


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _text(text: str) -> bytes:
    wide = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(wide), 28) + wide


SRGB_CURVE = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def gamma(value: float) -> bytes:
    return b"para\0\0\0\0" + struct.pack(">HH", 0, 0) + _fixed(value)


def profile(space: str, tags: dict[str, bytes], kind: str = "mntr", connection: str = "XYZ ") -> bytes:
    """A whole profile: header, tag table, tags."""
    tags = {"desc": _text("test"), "cprt": _text("none"), "wtpt": _xyz(*D50)} | tags
    body, table, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name.encode() + struct.pack(">II", at + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12s4sIIIIQI", at + len(body), b"\0\0\0\0", 0x04200000, kind.encode(), space.encode(),
        connection.encode(), b"\0" * 12, b"acsp", 0, 0, 0, 0, 0, 0,
    ) + _fixed(*D50)  # fmt: skip
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def rgb(matrix: np.ndarray = P3, curve: bytes = SRGB_CURVE) -> bytes:
    """RGB by the columns of a matrix to XYZ, and one curve."""
    columns = {f"{name}XYZ": _xyz(*matrix[:, index]) for index, name in enumerate("rgb")}
    return profile("RGB ", columns | {f"{name}TRC": curve for name in "rgb"})


def gray(curve: bytes) -> bytes:
    return profile("GRAY", {"kTRC": curve})


def cmyk(corner) -> bytes:
    """CMYK by a table of the 16 corners, each a function of (c, m, y, k) in {0, 1} to Lab."""
    corners = [corner(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    line = struct.pack(">HH", 0, 65535)
    data = b"mft2\0\0\0\0" + struct.pack(">BBBB", 4, 3, 2, 0) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    data += struct.pack(">HH", 2, 2) + line * 4
    for lightness, a, b in corners:  # the old 16-bit code of Lab: 100 is 0xFF00, 0 of a and b is 0x8000
        data += struct.pack(">HHH", round(lightness * 652.8), round((a + 128) * 256), round((b + 128) * 256))
    data += line * 3
    return profile("CMYK", {"A2B0": data}, "prtr", "Lab ")


def lab_to_srgb(lightness: float, a: float, b: float) -> np.ndarray:
    """Lab (D50) to sRGB 0..255 in float64, Bradford-adapted, CIE 15 and IEC 61966-2-1."""
    fy = (lightness + 16) / 116
    f = np.array([fy + a / 500, fy, fy - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50
    matrix = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    linear = np.clip(np.linalg.solve(matrix, xyz), 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
