"""What the documents say of the tests is so, and their figures are those that were measured."""

import re
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

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


class Figures(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.project = Path(folder.name)
        for part in ("docs", "scripts"):
            shutil.copytree(SOURCE / part, self.project / part)
        shutil.copy(SOURCE / "README.md", self.project)

    def report(self, *options: str) -> subprocess.CompletedProcess:
        command = [self.project / "scripts/bench-report", *options]
        return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def test_the_documents_have_the_figures_that_were_measured(self):
        outcome = self.report("--check")
        self.assertEqual(outcome.returncode, 0, outcome.stdout)

    def test_a_figure_that_is_changed_by_hand_is_found_and_written_again(self):
        page = self.project / "docs/specification.md"
        before = page.read_text()
        block = before.index("<!-- bench: start-of-a-pod -->")
        page.write_text(before[:block] + before[block:].replace(" ms |", " s |", 1))
        self.assertEqual(self.report("--check").returncode, 1)
        self.assertEqual(self.report().returncode, 0)
        self.assertEqual(page.read_text(), before)

    def test_what_was_not_measured_is_named(self):
        (self.project / "docs/measurements/pods.jsonl").unlink()
        outcome = self.report()
        self.assertEqual(outcome.returncode, 1)
        self.assertIn("make bench BENCH=pods", outcome.stdout)
