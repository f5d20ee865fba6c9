"""`sgtm bench`: the config and the options that reach the measurement."""

from pathlib import Path

from sgtm.commands.main import main


def test_bench_passes_its_options_and_the_keys_of_the_command_line(monkeypatch):
    noted = []
    monkeypatch.setattr("sgtm.measure.bench.bench", lambda *arguments: noted.append(arguments))
    command = ["bench", "debug", "--rounds", "7", "--json", "rows.jsonl", "--train.micro_batch", "4"]
    assert main(command) == main([*command, "--tune"]) == main([*command, "--peers"]) == 0
    assert [options for _, *options in noted] == [
        [7, Path("rows.jsonl"), tune, peers] for tune, peers in ((False, False), (True, False), (False, True))
    ]
    assert {config.train.micro_batch for config, *_ in noted} == {4}
