from __future__ import annotations

from pipeline import machine

MIB = 1 << 20


def test_memory_is_what_is_left_of_the_tightest_limit(tmp_path, monkeypatch):
    told = {"/proc/meminfo": "8192000 kB", "/proc/self/cgroup": ":/system.slice/train.service"}
    monkeypatch.setattr(machine, "_told", lambda path, _field: told[path])
    whole_mib = 8192000 // 1024
    groups = machine._left_to_groups_mib
    monkeypatch.setattr(machine, "_left_to_groups_mib", lambda: groups(tmp_path))
    assert machine.available_memory_mib() == whole_mib
    unit = tmp_path / "system.slice" / "train.service"
    unit.mkdir(parents=True)
    for folder, limit, used in ((unit, "max", 5 * MIB), (unit.parent, 4096 * MIB, 1000 * MIB)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 7\ninactive_file 0\nactive_file 0\n")
    assert machine.available_memory_mib() == 3096
    (unit / "memory.max").write_text(f"{4 * MIB}\n")
    assert machine.available_memory_mib() == 0
    (unit / "memory.stat").write_text(f"anon 7\ninactive_file {2 * MIB}\nactive_file {MIB}\n")
    assert machine.available_memory_mib() == 2
