"""The table of memory by remat policy and passes: what is missing is measured, and how it reads."""

import json

from benchmarks import plan_memory


def cell(size, passes, remat):
    return {
        "size": size,
        "passes": passes,
        "remat": remat,
        "state": 2**30,
        "kept": 2**31 if passes == "one" else 0,
        "temporaries": 2**29,
        "total": 2**32,
        "refused": "too large" if (passes, remat) == ("one", "none") else None,
    }


def test_a_measurement_goes_on_where_it_stopped(tmp_path):
    file, measured = tmp_path / "memory.json", []

    def measure(*name):
        measured.append(name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return cell(*name)

    for _ in range(2):
        try:
            cells = plan_memory.fill(plan_memory.known(file), ["xs"], measure, file)
        except KeyboardInterrupt:
            assert len(json.loads(file.read_text())) == 2
    assert len(measured) == 1 + 8  # the third twice
    assert plan_memory.table(cells).splitlines()[2:] == [
        "| xs | two | 1.00 | 4.00 (0.50) | 4.00 (0.50) | 4.00 (0.50) | 4.00 (0.50) |",
        "| xs | one | 1.00 | 4.00, refused | 4.00 (2.00 + 0.50) | 4.00 (2.00 + 0.50) | "
        "4.00 (2.00 + 0.50) |",
    ]
