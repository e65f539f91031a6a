"""What the documents say of the tests is so."""

import re
import unittest

from project import SOURCE

NAMED = re.compile(r"`([^`]+)`")


def sources() -> str:
    folders = ("agent", "ctl", "policy", "shim", "tests", "vmm")
    files = (file for folder in folders for file in (SOURCE / folder).rglob("*.rs"))
    return "\n".join(file.read_text() for file in files)


def rows(page: str) -> list[list[str]]:
    """The cells of the tables, without their heads."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line.startswith("|")]
    return [row for row in cells if row[-1] != "test" and not row[-1].startswith("---")]


def names(cell: str) -> list[str]:
    """The functions of tests: `module::{one, other}` is two."""
    last = [name.rsplit("::", 1)[-1] if "{" not in name else name.split("{")[1].rstrip("}") for name in NAMED.findall(cell)]
    return [name.strip().rsplit("::", 1)[-1].rsplit(" ", 1)[-1] for part in last for name in part.split(",")]


class ThreatModel(unittest.TestCase):
    def test_every_threat_has_a_test_that_exists(self):
        there = set(re.findall(r"\bfn (\w+)", sources()))
        there |= {file.stem for file in (SOURCE / "tests/fuzz/fuzz_targets").glob("*.rs")}
        threats = rows((SOURCE / "docs/threat-model.md").read_text())
        self.assertGreater(len(threats), 50)
        for row in threats:
            tests = names(row[-1])
            self.assertTrue(tests, f"no test for: {row[0]}")
            missing = [test for test in tests if test not in there]
            self.assertFalse(missing, f"{row[0]}: {missing}")
