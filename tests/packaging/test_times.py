"""The comparison of instruction-times with their records (tests/lab/compare-times), with times that are made up."""

import json
import subprocess
import tempfile
import unittest
from pathlib import Path

from project import SOURCE

TOOLS = {"guest kernel": "6.12", "lab's kernel": "6.12"}


class Records(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.results = Path(folder.name)
        self.records = self.results / "records.json"
        self.measure(exec=[90_000, 60_000, 60_500, 59_500, 20_000], start=[20_000])
        self.compare("--renew")

    def measure(self, tools: dict[str, str] = TOOLS, **times: list[int]):
        lines = [json.dumps({"name": name, "unit": "us", "samples": samples}) for name, samples in times.items()]
        (self.results / "measurements.jsonl").write_text("\n".join(lines))
        (self.results / "tools.json").write_text(json.dumps(tools))

    def compare(self, *options: str) -> subprocess.CompletedProcess:
        command = [SOURCE / "tests/lab/compare-times", self.results, "--records", self.records, *options]
        return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def test_the_record_is_the_mean_of_the_middle_half_of_each_time(self):
        self.assertEqual(json.loads(self.records.read_text())["times_us"], {"exec": 60_000, "start": 20_000})

    def test_a_time_that_is_more_than_3_percent_above_its_record_fails_and_says_what_to_do(self):
        self.measure(exec=[62_000, 61_000, 63_000, 20_000, 90_000], start=[20_000])
        outcome = self.compare()
        self.assertEqual(outcome.returncode, 1, outcome.stdout)
        self.assertRegex(outcome.stdout, r"FAILED: 'exec': 62,000 µs, record 60,000 µs, \+3.3 %")
        self.assertIn("make records", outcome.stdout)
        self.assertNotIn("FAILED: 'start'", outcome.stdout)

    def test_a_time_that_is_less_than_3_percent_above_its_record_passes(self):
        self.measure(exec=[61_700], start=[20_000])
        self.assertEqual(self.compare().returncode, 0)

    def test_a_time_that_has_become_better_passes_and_is_pointed_out(self):
        self.measure(exec=[58_000], start=[20_000])
        outcome = self.compare()
        self.assertEqual(outcome.returncode, 0)
        self.assertIn("'exec' is faster by more than 3 %", outcome.stdout)

    def test_a_time_that_was_not_measured_fails_and_so_does_one_without_a_record(self):
        self.measure(exec=[60_000])
        self.assertIn("'start' has a record, and was not measured", self.compare().stdout)
        self.measure(exec=[60_000], start=[20_000], other=[1])
        outcome = self.compare()
        self.assertEqual(outcome.returncode, 1)
        self.assertIn("'other' has no record", outcome.stdout)

    def test_a_lab_that_has_measured_nothing_fails(self):
        (self.results / "tools.json").unlink()
        self.assertEqual(self.compare().returncode, 1)

    def test_with_other_tools_some_more_is_theirs_but_not_everything(self):
        other = TOOLS | {"guest kernel": "6.13"}
        self.measure(other, exec=[66_000], start=[20_000])
        outcome = self.compare()
        self.assertEqual(outcome.returncode, 0, outcome.stdout)
        self.assertIn("other guest kernel than the record's: 6.13, not 6.12", outcome.stdout)
        self.measure(other, exec=[70_000], start=[20_000])
        self.assertEqual(self.compare().returncode, 1)


class Tree(unittest.TestCase):
    def test_the_records_of_the_project_are_of_what_the_lab_measures(self):
        record = json.loads((SOURCE / "tests/lab/records.json").read_text())
        script = (SOURCE / "tests/lab/payload/bench-times").read_text()
        self.assertTrue(record["times_us"])
        for name in record["times_us"]:
            self.assertIn(name, script)
