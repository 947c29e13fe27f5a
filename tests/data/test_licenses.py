"""Licences: recognised from their words, SPDX expressions understood, nothing allowed by mistake."""

from pathlib import Path

import pytest
from data.corpus import GPL, MIT

from indexshare.data.licenses import (
    LICENSE_FILE,
    PERMISSIVE,
    is_allowed,
    license_of_source,
    license_of_text,
    unfamiliar,
)

BSD = "Redistribution and use in source and binary forms, with or without modification, are permitted."


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (MIT, "MIT"),
        (GPL, "GPL-3.0"),
        ("# Licensed under the Apache License,\n# Version 2.0 (the License)", "Apache-2.0"),
        (BSD, "BSD-2-Clause"),
        (BSD + "\n * Names may not be used to endorse\n * or promote products.", "BSD-3-Clause"),
        ("GNU AFFERO GENERAL PUBLIC LICENSE\n  Version 3", "AGPL-3.0"),
        ("GNU LESSER GENERAL PUBLIC LICENSE\nVersion 2.1", "LGPL-2.1"),
        ("This program is under the GNU General Public License as published, either version 2", "GPL-2.0"),
        ("Mozilla Public License Version 2.0", "MPL-2.0"),
        ("// SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note", "GPL-2.0-only WITH Linux-syscall-note"),
        ("/* SPDX-License-Identifier: MIT */", "MIT"),
        ("All rights reserved. This license is mine.", ""),
        ("the river", ""),
    ],
)
def test_licences_are_recognised(text: str, name: str) -> None:
    assert license_of_text(text) == name


def test_the_licence_of_this_project_is_recognised() -> None:
    assert license_of_text((Path(__file__).parents[2] / "LICENSE").read_text()) == "MIT"


def test_a_notice_far_down_is_not_the_licence_of_the_file() -> None:
    assert license_of_source("x = 1\n" * 2000 + GPL) == ""


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("mit", True),
        ("Apache-2.0 OR GPL-3.0-only", True),
        ("(MIT OR GPL-2.0+) AND BSD-3-Clause", True),
        ("MIT AND GPL-3.0-or-later", False),
        ("GPL-2.0-only WITH Linux-syscall-note", False),
        ("MPL-2.0", False),
        ("Proprietary", False),
        ("", False),
    ],
)
def test_what_permissive_allows(expression: str, allowed: bool) -> None:
    assert is_allowed(expression, PERMISSIVE) is allowed


def test_a_list_may_name_anything() -> None:
    assert is_allowed("GPL-3.0-or-later", ["gpl-3.0"]) and is_allowed("EPL-2.0", ["EPL-2.0"])
    assert is_allowed("", ["unknown"])
    assert not is_allowed("MIT", ["unknown"])


def test_names_of_no_licence_that_is_recognised() -> None:
    assert unfamiliar([*PERMISSIVE, "unknown", "mit", " GPL-2.0+", "gpl-3.0-only", "apache", "MPL-2.0"]) == []
    assert unfamiliar(["MIT", "permisive", "EPL-2.0", ""]) == ["permisive", "EPL-2.0", ""]


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("LICENSE", True),
        ("license.txt", True),
        ("LICENCE.md", True),
        ("COPYING.LESSER", True),
        ("LICENSE-MIT", True),
        ("license.py", False),
        ("licenses.txt", False),
        ("my-license", False),
    ],
)
def test_names_of_licence_files(name: str, is_one: bool) -> None:
    assert (LICENSE_FILE.fullmatch(name) is not None) is is_one
