"""containerd as far as its configuration goes: what it makes of its files, and whether CRI loads with that.

The rules are those of the real one: of 1.7.24, and of 2.1.9, with the files that 2.2 reads where there is none. `run`
with CONTAINERD_1 and CONTAINERD_2 set to real programs has these asked instead.
"""

import copy
import glob
import json
import tomllib
from pathlib import Path

OLD, NEW = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"


class Refused(Exception):
    """containerd does not take the configuration."""


def default_runtimes(major: int) -> dict:
    """The runtimes where no file names any."""
    return {"runc": runtime({"runtime_type": "io.containerd.runc.v2", "options": {"SystemdCgroup": False}}, major)}


def runtime(given: dict, major: int) -> dict:
    """A runtime with the values that it has where the file does not say."""
    defaults = {"runtime_type": "", "privileged_without_host_devices": False, "pod_annotations": []}
    defaults["sandbox_mode" if major == 1 else "sandboxer"] = ""
    return defaults | given


def read(host: Path, path: str) -> dict:
    try:
        return tomllib.loads((host / path.lstrip("/")).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise Refused(f"{path}: {error}") from error


def files(host: Path, path: str) -> list[dict]:
    """The file and those that it imports."""
    main = read(host, path)
    found = [main]
    for pattern in main.get("imports", []):
        absolute = pattern if pattern.startswith("/") else str(Path(path).parent / pattern)
        found += [read(host, name.removeprefix(str(host))) for name in sorted(glob.glob(f"{host}{absolute}"))]
    return found


def settings(host: Path, version: tuple[int, int], path: str) -> dict:
    """What containerd makes of its files."""
    major = version[0]
    if not (host / path.lstrip("/")).exists():
        if major == 1:
            raise Refused(f"failed to load TOML: {path}")
        if version < (2, 2):
            return merged([], major)
        drop_ins = sorted(glob.glob(f"{host}/etc/containerd/conf.d/*.toml"))
        return merged([read(host, name.removeprefix(str(host))) for name in drop_ins], major)
    return merged(files(host, path), major)


def merged(sources: list[dict], major: int) -> dict:
    """What several files amount to. 1.7: of files that configure a plugin the last counts. 2.x: they are merged, but
    where one is of configuration version 3, what others say under the names of version 2 is ignored."""
    newest = max((source.get("version", 1) for source in sources), default=2 if major == 1 else 3)
    if newest > (2 if major == 1 else 3):
        raise Refused(f"expected containerd config version equal to or less than 3, got {newest}")
    result = {"version": 2 if major == 1 else 3, "oom_score": 0, "plugins": {}}
    for source in sources:
        result["oom_score"] = source.get("oom_score", result["oom_score"])
        for name, plugin in copy.deepcopy(source.get("plugins", {})).items():
            if major == 1 or name not in result["plugins"]:
                result["plugins"][name] = plugin
            else:
                deep_update(result["plugins"][name], plugin)
    ours = OLD if major == 1 else NEW
    if major > 1 and newest == 2 and OLD in result["plugins"]:
        result["plugins"][NEW] = result["plugins"].pop(OLD)
    elif major > 1 or newest < 2:
        result["plugins"].pop(OLD, None)
    containerd = result["plugins"].setdefault(ours, {}).setdefault("containerd", {})
    containerd.setdefault("default_runtime_name", "runc")
    named = containerd.get("runtimes")
    # 2.x adds what is named to its own; 1.7 has its own only where none is named.
    runtimes = default_runtimes(major) if major > 1 or named is None else {}
    for name, given in (named or {}).items():
        runtimes[name] = runtime(given, major)
    containerd["runtimes"] = runtimes
    return result


def deep_update(target: dict, source: dict):
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            deep_update(target[key], value)
        else:
            target[key] = value


def cri_loads(merged_settings: dict) -> bool:
    """CRI does not load without its default runtime."""
    plugins = merged_settings["plugins"]
    containerd = plugins.get(NEW, plugins.get(OLD))["containerd"]
    return containerd["default_runtime_name"] in containerd["runtimes"]


def dump(merged_settings: dict, major: int, imports: list[str]) -> str:
    """As `config dump` prints it: sorted, indented, quotes as the TOML library of the release has them."""
    quote = '"' if major == 1 else "'"
    text = [f"imports = {json.dumps(imports)}"]

    def key(name: str) -> str:
        return f"{quote}{name}{quote}" if "." in name else name

    def value(thing) -> str:
        return json.dumps(thing) if major == 1 else json.dumps(thing).replace('"', "'")

    def table(path: list[str], content: dict):
        indent = "  " * max(len(path) - 1, 0)
        if path:
            text.append(f"\n{indent}[{'.'.join(map(key, path))}]")
        for name, thing in sorted(content.items()):
            if not isinstance(thing, dict):
                text.append(f"{indent}{'  ' if path else ''}{key(name)} = {value(thing)}")
        for name, thing in sorted(content.items()):
            if isinstance(thing, dict):
                table([*path, name], thing)

    table([], merged_settings)
    return "\n".join(text) + "\n"
