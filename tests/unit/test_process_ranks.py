"""Where a process is among the ranks, from the variables of each launcher."""

import pytest

from sgtm.process.ranks import RankInfo, detect_launch, on_one_machine, rank_and_size

ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
RANKS = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", **ADDRESS}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, RankInfo("none")),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, RankInfo("none")),  # a batch script's own shell
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, RankInfo("none")),  # interactive
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, RankInfo("none")),  # srun of one: alone
        (
            {**RANKS, **ADDRESS, "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"},
            RankInfo("torchrun", 5, 8, 1, 4),
        ),
        ({**RANKS, **ADDRESS, "LOCAL_SIZE": "4", "CROSS_RANK": "1"}, RankInfo("deepspeed", 5, 8, 1, 4)),
        ({**RANKS, **ADDRESS}, RankInfo("env", 5, 8, 1, 1)),
        (
            {
                **ADDRESS,
                "SLURM_STEP_ID": "0",
                "SLURM_NTASKS": "8",
                "SLURM_PROCID": "5",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
            },
            RankInfo("srun", 5, 8, 1, 4),
        ),
    ],
)
def test_place_of_the_process(variables, expected):
    assert detect_launch(variables) == expected


@pytest.mark.parametrize(
    ("tasks", "counts"), [("3", [3]), ("4(x2)", [4, 4]), ("2,1", [2, 1]), ("2(x3),1", [2, 2, 2, 1])]
)
def test_slurm_counts_the_ranks_of_each_node(tasks, counts):
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "7", "SLURM_PROCID": "6", "SLURM_LOCALID": "0", **ADDRESS}
    step["SLURM_STEP_TASKS_PER_NODE"] = tasks
    sizes = [detect_launch({**step, "SLURM_NODEID": str(node)}).local_world_size for node in range(len(counts))]
    assert sizes == counts
    for wrong in ({"SLURM_NODEID": str(len(counts))}, {"SLURM_STEP_TASKS_PER_NODE": f"{tasks}(y)"}):
        with pytest.raises(ValueError, match="SLURM_STEP_TASKS_PER_NODE"):
            detect_launch(step | wrong)


def test_half_a_launch_names_what_is_missing():
    with pytest.raises(ValueError, match=r"MASTER_ADDR, MASTER_PORT not set.*unset RANK, WORLD_SIZE, LOCAL_RANK"):
        detect_launch(RANKS)
    with pytest.raises(ValueError, match=r"srun, but MASTER_ADDR, MASTER_PORT not set.*or unset SLURM_STEP_ID to run"):
        detect_launch({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    with pytest.raises(ValueError, match=r"whole numbers.*'RANK': 'one'"):
        detect_launch({**RANKS, **ADDRESS, "RANK": "one"})


@pytest.mark.parametrize(("rank", "size"), [("8", "8"), ("-1", "8"), ("0", "0")])
def test_a_rank_that_there_is_not(rank, size):
    with pytest.raises(ValueError, match=f"RANK {rank} is none of the ranks.* WORLD_SIZE is {size}"):
        detect_launch({**RANKS, **ADDRESS, "RANK": rank, "WORLD_SIZE": size})


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, True),
        ({**RANKS, **ADDRESS}, True),  # set by hand: the ranks of a machine are not set
        (RANKS, True),  # incomplete
        ({**RANKS, **ADDRESS, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "8"}, True),
        ({**RANKS, **ADDRESS, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4"}, False),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "8"}, True),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, False),
    ],
)
def test_ranks_on_one_machine(variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert on_one_machine() is expected


def test_rank_and_size_for_messages():
    assert rank_and_size({}) == ("0", "1")
    assert rank_and_size({"RANK": "one", "WORLD_SIZE": "8"}) == ("one", "8")
    assert rank_and_size(STEP) == ("5", "8")
