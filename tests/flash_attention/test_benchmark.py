"""The benchmark runs, and writes what a figure needs to be quoted."""

import json

from benchmarks import run


def test_smoke(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert (
        run.main(
            ["flash_attention", "--smoke", "--device", "cpu", "--repeats", "1", "--json", str(path)]
        )
        == 0
    )
    document = json.loads(path.read_text())
    assert {"date", "torch", "triton", "device"} <= set(document["environment"])
    op = document["ops"]["flash_attention"]
    assert "4*D" in op["flop_formula"]
    seen = {(r["direction"], r["implementation"]) for r in op["records"]}
    assert seen == {
        (d, i) for d in ("forward", "backward") for i in ("ours_torch", "sdpa", "plain")
    }
    for record in op["records"]:
        assert record["seconds"]["median"] > 0
        assert record["peak_bytes"] > 0
    assert "flash_attention" in capsys.readouterr().out
