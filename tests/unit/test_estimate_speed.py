"""Time of a plan, by hand: how long a step and the run take."""

import pytest

from sgtm.config import load_config
from sgtm.estimate.shapes import model_flops
from sgtm.estimate.speed import Machine
from sgtm.estimate.stages import estimate


def test_speed_by_hand():
    """Two nodes of two: every rank sends, half of them to the other node; the slower network sets the pace."""
    config = load_config("debug", ["--train.micro_batch=1", "--train.precision=fp32"])
    machine = Machine(nodes=2, gpus=2, tflops=1e-6, inside=1e-3, between=1e-4, reached=0.5, sustained=0.8)
    plain, *_, last = estimate(config, machine)
    sent = 2 * 4 * 35_392 * 3 / 4
    assert (plain.speed.inside, plain.speed.between) == (sent / 2, sent)
    assert plain.speed.communication == pytest.approx(sent / (1e5 * 0.8))
    assert plain.speed.compute == pytest.approx(model_flops(config.model) * 512 / (4e6 * 0.5))
    for row in (plain, last):
        assert row.speed.step == row.speed.compute + row.speed.communication
        assert row.speed.tokens_per_second == pytest.approx(512 / row.speed.step)
    assert plain.speed.best_step == pytest.approx(plain.speed.step)
    assert last.speed.best_step == pytest.approx(max(last.speed.compute, last.speed.communication))
    assert plain.speed.utilisation == pytest.approx(0.5 * plain.speed.compute / plain.speed.step)
    one_node, *_ = estimate(config, Machine(nodes=1, gpus=4))
    assert (one_node.speed.inside, one_node.speed.between) == (sent, 0)


@pytest.mark.parametrize("tflops", [1e-7, 10.0])
def test_zero_2_hides_the_reduction_of_gradients_alone_at_best(tflops):
    """Behind the computation, or the computation behind it; the weights are gathered after the optimizer."""
    config = load_config("debug", ["--train.micro_batch=1"])
    two = estimate(config, Machine(gpus=4, tflops=tflops, inside=1e-3, sustained=1.0))[2]
    reduction, gathering = (collective.sent(4) / 1e6 for collective in two.moved)
    assert two.speed.communication == pytest.approx(reduction + gathering)
    assert (two.speed.compute > reduction) == (tflops < 1)
    assert two.speed.best_step == pytest.approx(max(two.speed.compute, reduction) + gathering)


def test_the_run_in_days_and_gpu_hours():
    config = load_config("debug", ["--train.micro_batch=1", "--train.steps=1000"])
    for row in estimate(config, Machine(nodes=2, gpus=2, tflops=1e-3, inside=1e-2)):
        for duration, step in ((row.whole, row.speed.step), (row.best, row.speed.best_step)):
            assert duration.days * 86_400 == pytest.approx(1000 * step)
            assert duration.gpu_hours * 3600 == pytest.approx(4 * 1000 * step)
        assert row.best.days <= row.whole.days
