"""Which licence a text is under: SPDX headers, and licence texts recognised by their words. What is allowed."""

import re
from collections.abc import Collection

UNKNOWN = "unknown"
PERMISSIVE = frozenset(
    "0BSD Apache-2.0 BSD-2-Clause BSD-3-Clause BSL-1.0 CC0-1.0 ISC MIT MIT-0 PSF-2.0 Python-2.0 Unlicense Zlib".split()
)
COPYLEFT = frozenset("AGPL-3.0 GPL-2.0 GPL-3.0 LGPL-2.1 LGPL-3.0 MPL-2.0".split())
LICENSE_FILE = re.compile(r"(licen[cs]e|copying|unlicense)([.-](?!py$|rs$|go$|js$|c$|h$).*)?", re.IGNORECASE)

# Licence texts quote each other: the first line whose words all occur says the licence, so the more telling come first.
_TEXTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("PSF-2.0", ("python software foundation license version 2",)),
    ("MPL-2.0", ("mozilla public license", "2.0")),
    ("AGPL-3.0", ("gnu affero general public license", "version 3")),
    ("LGPL-3.0", ("gnu lesser general public license", "version 3")),
    ("LGPL-2.1", ("gnu lesser general public license", "2.1")),
    ("GPL-3.0", ("gnu general public license", "version 3")),
    ("GPL-2.0", ("gnu general public license", "version 2")),
    ("Apache-2.0", ("apache license", "version 2.0")),
    ("CC0-1.0", ("cc0 1.0 universal",)),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",)),
    ("BSL-1.0", ("boost software license version 1.0",)),
    ("Zlib", ("altered source versions must be plainly marked as such",)),
    ("BSD-3-Clause", ("redistribution and use in source and binary forms", "endorse or promote products")),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms",)),
    ("MIT", ("permission is hereby granted free of charge to any person obtaining a copy", "above copyright notice")),
    ("MIT-0", ("permission is hereby granted free of charge to any person obtaining a copy",)),
    ("ISC", ("permission to use copy modify and", "for any purpose with or without fee", "above copyright notice")),
    ("0BSD", ("permission to use copy modify and", "for any purpose with or without fee")),
)
_SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([\w.+() -]+)")
_SHORT_NAMES = {"apache2.0": "Apache-2.0", "apache": "Apache-2.0", "bsd": "BSD-2-Clause", "psf": "PSF-2.0"}
_KNOWN = {name.lower(): name for name in PERMISSIVE | COPYLEFT}
_HEAD = 4096  # characters of a source file in which a licence may stand


def license_of_text(text: str) -> str:
    """The SPDX name of a licence text or of the notice at the top of a source file; "" when there is none we know."""
    if found := _SPDX.search(text[:_HEAD]):
        return found[1].strip()
    if "icen" not in text and "ICEN" not in text and "ermission" not in text and "edistribution" not in text:
        return ""
    words = " ".join(re.findall(r"[a-z0-9][a-z0-9.]*[a-z0-9]|[a-z0-9]", text[: 16 * _HEAD].lower()))
    return next((name for name, phrases in _TEXTS if all(phrase in words for phrase in phrases)), "")


def license_of_source(text: str) -> str:
    """The licence that a source file states for itself in its first lines; "" when it states none."""
    return license_of_text(text[:_HEAD])


def is_allowed(expression: str, allowed: Collection[str]) -> bool:
    """Whether an SPDX expression can be fulfilled with allowed licences: one side of an OR, both sides of an AND.

    allowed: SPDX names without -only and -or-later, in any case; "unknown" allows what states no licence.
    """
    names = {_canonical(name) for name in allowed}
    if not expression:
        return UNKNOWN in names
    alternatives = re.split(r"\s+OR\s+|,", expression.replace("(", " ").replace(")", " "), flags=re.IGNORECASE)
    return any(
        all(_canonical(part) in names for part in re.split(r"\s+AND\s+", alternative, flags=re.IGNORECASE))
        for alternative in alternatives
    )


def unfamiliar(allowed: Collection[str]) -> list[str]:
    """Names of no licence that is recognised here: only what states them itself is under one."""
    familiar = {UNKNOWN} | PERMISSIVE | COPYLEFT
    return [name for name in allowed if _canonical(name) not in familiar]


def _canonical(name: str) -> str:
    name = re.split(r"\s+WITH\s+", name.strip(), flags=re.IGNORECASE)[0].removesuffix("+")
    name = name.removesuffix("-only").removesuffix("-or-later").lower()
    return _KNOWN.get(_SHORT_NAMES.get(name, name).lower(), name)
