"""`make install` and `make uninstall`."""

import shutil
import subprocess
import tempfile
import tomllib
import unittest
from pathlib import Path

from project import Project, contents, write

CONFIG = "etc/mayu/config.toml"


class Install(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.project = Project(Path(directory.name) / "project")
        self.root = Path(directory.name) / "root"

    def install(self, *variables: str) -> str:
        return self.project.make("install", f"DESTDIR={self.root}", *variables).stdout

    def uninstall(self, *variables: str, check: bool = True):
        return self.project.make("uninstall", f"DESTDIR={self.root}", *variables, check=check)

    def file(self, path: str) -> Path:
        return self.root / path

    def edit_config(self):
        text = self.file(CONFIG).read_text()
        self.file(CONFIG).write_text(text.replace("memory_mib = 256", "memory_mib = 512"))

    def test_what_is_installed_is_where_the_configuration_says(self):
        for prefix in ("/usr", "/usr/local", "/opt/mayu/"):
            with self.subTest(prefix=prefix):
                self.install(f"PREFIX={prefix}")
                vm = tomllib.loads(self.file(CONFIG).read_text())["vm"]
                for key, content in (("vmm", "vmm"), ("kernel", "kernel"), ("image", "image")):
                    self.assertEqual(Path(f"{self.root}{vm[key]}").read_text(), f"{content} first\n")
                for program in ("containerd-shim-mayu-v2", "mayu"):
                    self.assertEqual(self.file(f"{prefix[1:]}/bin/{program}").stat().st_mode & 0o777, 0o755)
                unit = self.file(f"{prefix[1:]}/lib/systemd/system/mayu-template.service").read_text()
                self.assertIn(f"ExecStart={prefix.rstrip('/')}/bin/mayu template create\n", unit)
                self.assertIn(f"{prefix.rstrip('/')}/share/doc/mayu/config.toml\n", unit)
                self.uninstall(f"PREFIX={prefix}")

    def test_an_installation_for_usr_has_the_configuration_of_the_repository(self):
        self.install()
        self.assertEqual(
            self.file(CONFIG).read_text(), (self.project.directory / "config/config.toml").read_text()
        )

    def test_examples_come_along(self):
        self.install()
        doc = self.file("usr/share/doc/mayu")
        tomllib.loads((doc / "containerd/containerd-2.toml").read_text())
        self.assertTrue((doc / "kubernetes/base/kustomization.yaml").exists())
        self.assertTrue((doc / "kubernetes/examples/pod.yaml").exists())

    def test_policies_come_along_with_their_tests(self):
        self.install()
        installed = self.file("usr/share/mayu/policies")
        shipped = self.project.directory / "config/policies"
        self.assertEqual(contents(installed), contents(shipped))
        self.assertIn("restricted.rego", contents(installed))

    def test_uninstalling_leaves_nothing(self):
        self.install()
        self.uninstall()
        self.assertFalse(self.root.exists())

    def test_uninstalling_leaves_what_others_have_put_there(self):
        write(self.file("usr/bin/other"), "other")
        self.file("usr/share/doc").mkdir(parents=True)
        before = contents(self.root)
        self.install()
        write(self.file("usr/share/mayu/mine"), "mine")
        self.uninstall()
        left = contents(self.root)
        self.assertEqual(left.pop("usr/share/mayu/mine"), b"mine")
        self.assertIsNone(left.pop("usr/share/mayu"))
        self.assertEqual(left, before)

    def test_templates_go_with_what_they_are_made_of(self):
        self.install()
        for saved in ["templates/1", "snapshots/0f"]:
            write(self.file(f"var/lib/mayu/{saved}/memory"), "memory")
        self.uninstall()
        self.assertFalse(self.file("var/lib/mayu").exists())

    def test_uninstalling_twice_or_without_an_installation_is_no_error(self):
        self.assertIn("nothing to remove", self.uninstall().stdout)

    def test_an_empty_destdir_means_the_root(self):
        plan = self.project.make("install", "--dry-run", "DESTDIR=").stdout
        self.assertIn('scripts/install release "" "/usr"', plan)

    def test_a_prefix_that_is_no_absolute_path_is_refused(self):
        for prefix in ("usr", "/", "/a b", "/a|b"):
            outcome = self.project.run(
                "scripts/install", "release", str(self.root), prefix, check=False
            )
            self.assertNotEqual(outcome.returncode, 0, prefix)
            self.assertIn("PREFIX", outcome.stdout)
        self.assertFalse(self.root.exists())

    def test_installing_the_same_again_writes_nothing(self):
        self.install()
        before = {path: path.stat().st_ino for path in self.root.rglob("*")}
        self.assertNotIn("wrote", self.install())
        self.assertEqual({path: path.stat().st_ino for path in self.root.rglob("*")}, before)
        self.uninstall()
        self.assertFalse(self.root.exists())

    def test_a_file_that_is_in_use_keeps_its_content(self):
        self.install()
        with self.file("usr/share/mayu/guest.erofs").open() as image:
            self.project.build("second")
            self.install()
            self.assertEqual(image.read(), "image first\n")
        self.assertEqual(self.file("usr/share/mayu/guest.erofs").read_text(), "image second\n")

    def test_a_running_program_can_be_replaced(self):
        self.install()
        vmm = self.file("usr/libexec/mayu/mayu-vmm")
        shutil.copy("/bin/sleep", vmm)
        with Running(vmm):
            self.install()
        self.assertEqual(vmm.read_text(), "vmm first\n")

    def test_an_installation_that_fails_changes_nothing(self):
        self.install()
        before = contents(self.root)
        self.project.build("second")
        # A folder in the place of a file that would be copied last.
        self.file("usr/share/mayu/vmlinux.mayu-new").mkdir()
        outcome = self.project.make("install", f"DESTDIR={self.root}", check=False)
        self.assertNotEqual(outcome.returncode, 0)
        self.file("usr/share/mayu/vmlinux.mayu-new").rmdir()
        self.assertEqual(contents(self.root), before)

    def test_a_file_that_a_new_version_no_longer_has_goes(self):
        self.install()
        (self.project.directory / "config/containerd-1.toml").unlink()
        self.install()
        self.assertFalse(self.file("usr/share/doc/mayu/containerd/containerd-1.toml").exists())
        self.uninstall()
        self.assertFalse(self.root.exists())

    def test_an_edited_configuration_is_kept_by_both(self):
        self.install()
        self.edit_config()
        edited = self.file(CONFIG).read_text()
        self.assertIn("kept /etc/mayu/config.toml", self.install())
        self.assertEqual(self.file(CONFIG).read_text(), edited)
        self.assertIn("kept /etc/mayu/config.toml", self.uninstall().stdout)
        self.assertEqual(contents(self.root), {"etc": None, "etc/mayu": None, CONFIG: edited.encode()})

    def test_an_untouched_configuration_becomes_the_new_one(self):
        self.install()
        source = self.project.directory / "config/config.toml"
        source.write_text(source.read_text().replace("boot = 20", "boot = 30"))
        self.install()
        self.assertEqual(tomllib.loads(self.file(CONFIG).read_text())["timeouts"]["boot"], 30)

    def test_nothing_is_removed_while_pods_run(self):
        self.install()
        process = self.file("proc/4711")
        process.mkdir(parents=True)
        for program in ("containerd-shim-mayu-v2", "containerd-shim-mayu-v2 (deleted)"):
            (process / "exe").symlink_to(f"/usr/bin/{program}")
            outcome = self.uninstall(check=False)
            self.assertNotEqual(outcome.returncode, 0)
            self.assertIn("4711", outcome.stdout)
            self.assertTrue(self.file("usr/bin/mayu").exists())
            (process / "exe").unlink()
        (process / "exe").symlink_to("/usr/bin/containerd-shim-runc-v2")
        self.uninstall()
        self.assertFalse(self.file("usr").exists())

    def test_force_removes_all_the_same(self):
        self.install()
        self.file("proc/1").mkdir(parents=True)
        self.file("proc/1/exe").symlink_to("/usr/bin/containerd-shim-mayu-v2")
        self.uninstall("FORCE=yes")
        self.assertFalse(self.file("usr").exists())


class Running:
    """A program that runs until the end of the block."""

    def __init__(self, program: Path):
        self.program = program

    def __enter__(self):
        self.process = subprocess.Popen([self.program, "infinity"])

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
