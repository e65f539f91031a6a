"""A copy of the project's scripts and configuration, with a few bytes each for what takes long to build."""

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]

# Runs the stand-in for `mayu` that belongs to the made-up host.
MAYU = '#!/bin/sh\nexec made-up-mayu "$@"\n'


class Project:
    """Where the scripts run: as in a checkout in which everything has been built."""

    def __init__(self, directory: Path):
        self.directory = directory
        for part in ("config", "scripts"):
            shutil.copytree(SOURCE / part, directory / part)
        shutil.copy(SOURCE / "Makefile", directory)
        self.build("first")

    def build(self, version: str):
        """Makes every built file anew; their content names the version."""
        release = self.directory / "target/release"
        write(release / "containerd-shim-mayu-v2", f"shim {version}\n", 0o755)
        write(self.directory / "target/x86_64-unknown-linux-gnu/release/mayu-vmm", f"vmm {version}\n", 0o755)
        write(release / "mayu", f"{MAYU}# {version}\n", 0o755)
        write(self.directory / "built/vmlinux", f"kernel {version}\n")
        write(self.directory / "built/guest.erofs", f"image {version}\n")
        write(self.directory / "rootfs/build-kernel", "#!/bin/sh\necho built/vmlinux\n", 0o755)
        write(self.directory / "rootfs/build-image", "#!/bin/sh\necho built/guest.erofs\n", 0o755)

    def make(self, target: str, *variables: str, check: bool = True) -> subprocess.CompletedProcess:
        """Runs make for one target, as if what it depends on had been built."""
        return self.run("make", "-o", "build", "-o", "guest", target, *variables, check=check)

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        variables = {key: value for key, value in os.environ.items() if key != "CARGO_TARGET_DIR"}
        outcome = subprocess.run(
            command, cwd=self.directory, env=variables | env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        if check and outcome.returncode:
            raise AssertionError(f"{' '.join(command)} failed:\n{outcome.stdout}")
        return outcome


def write(path: Path, text: str, mode: int = 0o644):
    """Writes a file as a new one, as installers and compilers do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(mode)


def contents(root: Path) -> dict[str, bytes | None]:
    """Everything below a directory: the bytes of files, None for directories."""
    return {
        str(path.relative_to(root)): None if path.is_dir() and not path.is_symlink() else path.read_bytes()
        for path in root.rglob("*") if not path.is_symlink()
    }
