"""What ZeRO 3 gathers, and that its limits are DeepSpeed's own."""

from sgtm.config import load_config
from sgtm.estimate.shapes import parameter_sizes
from sgtm.estimate.zero3 import Limits, gathers


def test_limits_are_deepspeeds_own():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from sgtm.distributed.engine import BUCKET

    defaults, ours = DeepSpeedZeroConfig(stage=3), Limits()
    assert (ours.persistence, ours.reuse) == (defaults.param_persistence_threshold, defaults.max_reuse_distance)
    assert (ours.prefetch, ours.live) == (defaults.prefetch_bucket_size, defaults.max_live_parameters)
    assert (ours.bucket, ours.sub_group) == (BUCKET, defaults.sub_group_size)
    assert DeepSpeedZeroConfig(stage=2).overlap_comm is False and defaults.overlap_comm is True


def test_a_model_beyond_the_reuse_distance_is_gathered_twice():
    """All but the last billion elements of the forward pass, which the backward pass begins with."""
    config = load_config("llama-7b", ["--model.activation_checkpointing=false"])
    sizes = parameter_sizes(config)
    schedule = gathers(config, Limits())
    gathered = sum(sizes[name] for name in schedule.names)
    large = sum(size for size in sizes.values() if size > Limits().persistence)
    assert 2 * large - 1.2e9 < gathered < 2 * large and 5e8 < schedule.peak < 1.5e9
    assert gathers(load_config("gpt2-124m", ["--masking.strategy=none"]), Limits()).peak <= 124_475_904
