"""Amounts of memory, as a user writes them."""

import re

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Size(float):
    """
    An amount of memory: a fraction below 1, a number of bytes, or a text such as `"8GB"` (10^9) or `"8GiB"` (2^30).

    Example:

    ```python
    >>> from smartfrz_hf.sizes import Size

    >>> float(Size("1.5GB"))
    1500000000.0
    ```
    """

    def __new__(cls, value: float | str) -> "Size":
        """Read a text; raises `ValueError` for one that is no size."""
        if isinstance(value, str):
            match = re.fullmatch(r"((?:\d+\.?\d*|\.\d+)(?:E[+-]?\d+)?) ?([KMGT]I?)?B?", value.strip().upper())
            if match is None:
                raise ValueError(f"{value!r} is no size; give a fraction, bytes, or a text such as '8GB'.")
            value = float(match[1]) * UNITS[match[2] or ""]
        return super().__new__(cls, value)
