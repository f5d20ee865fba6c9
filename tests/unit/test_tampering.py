"""Attacks by fine-tuning: what they train and what they cannot use, their data and schedule, and the worst case."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from corpora import build, config_for, mixed_records, spanned_corpus
from random_models import moved_model

from sgtm.data.shuffled_sequences import ShuffledSequences
from sgtm.evaluation.losses import evaluate
from sgtm.evaluation.subject import Subject
from sgtm.evaluation.tampering import (
    Attack,
    AttackData,
    Documents,
    HeldOut,
    Reached,
    difference,
    evaluated_steps,
    held_out,
    relearned,
    tamper,
    worst_case,
)
from sgtm.model.transformer import Transformer

ATTACK = Attack("forget", (("es",),), lr=1e-2, schedule="cosine", steps=4, warmup=1, tokens=64, evaluated=(0, 1, 4))
MIXED = replace(ATTACK, data="forget+retain", parts=(("es",), ("en",)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data") / "corpus", mixed_records())


def subject(corpus, removed=("es",), **masking) -> Subject:
    config = config_for(masking=masking)
    return Subject(moved_model(config, 0.1), corpus, config, removed)


def copy_of(model: Transformer) -> Transformer:
    other = Transformer(model.config, model.partition, model.backend)
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def with_other_group(model: Transformer, domain: str = "es") -> Transformer:
    """The same model but for all that belongs to the domain."""
    other = copy_of(model)
    rows = model.parameter_rows()
    for name, parameter in other.named_parameters():
        for start, end, key in rows[name].segments(parameter[0].numel()):
            if key.endswith(f".{domain}"):
                parameter.view(-1)[start:end] = torch.randn(end - start) * 3
    return other


def curve(subject: Subject, attack: Attack) -> list[tuple[int, HeldOut]]:
    return [(step, held_out(attacked, ["es"], ["en"])) for step, attacked in tamper(subject, attack)]


def final(subject: Subject, attack: Attack) -> dict[str, torch.Tensor]:
    return [{n: p.detach().clone() for n, p in s.model.named_parameters()} for _, s in tamper(subject, attack)][-1]


@pytest.mark.parametrize("embedding", ["none", "full", 2])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_an_attack_cannot_use_what_was_removed(corpus, embedding, decay):
    """The curve is the same to the bit whatever the removed group holds: a model that never saw the domain is its own
    control. The group's weights stay, also under weight decay; everything else is trained."""
    torch.manual_seed(0)
    attack = replace(MIXED, weight_decay=decay)
    first = subject(corpus, domain_embedding=embedding)
    second = replace(first, model=with_other_group(first.model))
    assert curve(first, attack) == curve(second, attack)
    attacked, rows = final(second, attack), second.model.parameter_rows()
    owned = 0
    for name, before in second.model.named_parameters():
        for start, end, key in rows[name].segments(before[0].numel()):
            same = torch.equal(attacked[name].view(-1)[start:end], before.detach().view(-1)[start:end])
            owned += key.endswith(".es")
            assert same == key.endswith(".es"), (name, key)
    assert owned == 4 + 1 + (0 if embedding == "none" else 1 if embedding == "full" else 2)  # `mlp_in` has a bias


def test_with_nothing_removed_the_group_is_used(corpus):
    first = subject(corpus, removed=(), domain_embedding="full")
    second = replace(first, model=with_other_group(first.model))
    assert curve(first, MIXED) != curve(second, MIXED)
    attacked = final(first, MIXED)
    assert not torch.equal(attacked["blocks.0.mlp.w_out"], first.model.blocks[0].mlp.w_out)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_updates_are_those_of_adamw(corpus, schedule, clip):
    attacked = subject(corpus)
    attack = replace(MIXED, schedule=schedule, clip=clip, weight_decay=1.0)
    model = copy_of(attacked.model)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    groups = [{"params": matrices, "weight_decay": 1.0}, {"params": [p for p in model.parameters() if p.dim() < 2]}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    data = AttackData(attacked.corpus, attacked.config, attack)
    for step in range(attack.steps):
        optimizer.zero_grad()
        for batch in data.step(step):
            plan = batch.plan(attacked.tables)
            model(batch.input_ids, batch.targets, plan, 1 / batch.step_targets)[0].backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = attack.learning_rate(step)
        optimizer.step()
    rows, result = model.parameter_rows(), final(attacked, attack)
    for name, parameter in model.named_parameters():
        for start, end, key in rows[name].segments(parameter[0].numel()):
            if not key.endswith(".es"):  # which decays in torch's
                one, two = parameter.detach().view(-1)[start:end], result[name].view(-1)[start:end]
                assert torch.allclose(one, two, atol=2e-5), name


def test_step_0_is_the_ablated_model_and_the_model_itself_stays(corpus):
    attacked = subject(corpus)
    before = {name: p.detach().clone() for name, p in attacked.model.named_parameters()}
    losses = curve(attacked, ATTACK)
    assert [step for step, _ in losses] == [0, 1, 4]
    assert losses[0][1] == held_out(attacked, ["es"], ["en"])
    assert losses[-1][1].forget.value < losses[0][1].forget.value
    assert all(torch.equal(before[name], p) for name, p in attacked.model.named_parameters())


def test_an_attack_that_diverges_ends(corpus):
    attacked = subject(corpus)
    attack = replace(ATTACK, schedule="constant", warmup=0, lr=1e38, clip=0.0)
    assert [step for step, _ in tamper(attacked, attack)] == [0, 1]


def test_held_out_losses_are_those_of_the_evaluation(corpus):
    attacked = subject(corpus)
    whole = evaluate(attacked.model, corpus, attacked.config, split="test", sequences=None, device=torch.device("cpu"))
    estimates = held_out(attacked, ["es"], ["en", "web"])
    losses, errors = whole.losses["without es"], whole.sample["errors"]["without es"]
    for category, estimate in estimates.categories.items():
        assert estimate.value == pytest.approx(losses[category], rel=1e-6)
        assert estimate.error == pytest.approx(errors[category], rel=1e-3)
    assert estimates.forget == estimates.categories["es"]
    counts = {name: counts["tokens"] for name, counts in whole.sample["measured"].items()}
    mean = (losses["en"] * counts["en"] + losses["web"] * counts["web"]) / (counts["en"] + counts["web"])
    assert estimates.retain is not None and estimates.retain.value == pytest.approx(mean, rel=1e-6)
    assert estimates.retain.error is not None and estimates.retain.error < min(errors["en"], errors["web"])
    assert held_out(attacked, ["es"]).retain is None


def test_held_out_documents_pair_two_models(corpus):
    """Full and ablated model: the error of their difference is that of the evaluation, which pairs documents too."""
    ablated = subject(corpus)
    sample = evaluate(
        ablated.model, corpus, ablated.config, split="test", sequences=None, device=torch.device("cpu")
    ).sample
    measured = [held_out(each, ["es"]) for each in (ablated, replace(ablated, removed=()))]
    for estimates in measured:
        assert sum(estimates.documents.losses) / sum(estimates.documents.targets) == estimates.forget.value
        assert len(estimates.documents.targets) == sample["measured"]["es"]["documents"] > 2
    pair = [Reached(ATTACK, 0, each.forget.value, documents=each.documents) for each in measured]
    error = sample["difference_errors"]["without es"]["es"]
    assert difference(*pair) == (pair[0].loss - pair[1].loss, pytest.approx(error, rel=1e-3), True)
    es, web, both = (held_out(ablated, names).documents for names in (["es"], ["web"], ["es", "web"]))
    assert both == (es.losses + web.losses, es.targets + web.targets)


@pytest.mark.parametrize(("tokens", "shares"), [(64, [2, 2]), (80, [3, 2])])
def test_a_step_has_equal_shares_and_one_mean(corpus, tokens, shares):
    data = AttackData(corpus, config_for(micro_batch=3, sequences=3), replace(MIXED, tokens=tokens))
    batches = data.step(5)
    labels = [label for batch in batches for label in batch.labels]
    assert {2: shares[0], 1: shares[1]} == {
        label: sum(n for b in batches for la, n in zip(b.labels, b.lengths, strict=True) if la == label) // 16
        for label in set(labels)
    }
    assert [len(batch.input_ids) for batch in batches] == [3, tokens // 16 - 3]
    assert {batch.step_targets for batch in batches} == {sum(int((b.targets != -100).sum()) for b in batches)}
    assert batches[0].step_labels == {1, 2}


def test_steps_continue_in_the_shuffled_order_of_the_attacks_seed(corpus):
    """Each category is read in the order of the seed, without a sequence twice before all were read."""

    def read(attack: Attack, steps: range) -> list[tuple[int, ...]]:
        data = AttackData(corpus, config_for(), attack)
        return [tuple(ids) for step in steps for batch in data.step(step) for ids in batch.input_ids.tolist()]

    epoch = ShuffledSequences(corpus, config_for(), ["es"], 0, 0)
    everything = Counter(tuple(sequence.input_ids.tolist()) for sequence in epoch.take(0, len(epoch)))
    once = read(ATTACK, range(len(epoch) // 4))
    assert len(once) > 12 and not Counter(once) - everything
    assert read(ATTACK, range(2, 4)) == once[8:16]
    other = read(replace(ATTACK, seed=1), range(len(epoch) // 4))
    assert other != once and not Counter(other) - everything


def test_targets_in_spans_are_those_of_the_category(tmp_path):
    corpus = spanned_corpus(tmp_path / "corpus")
    attack = replace(ATTACK, parts=(("toxin",),))
    batches = AttackData(corpus, config_for(), attack).step(0)
    capital = corpus.tokenizer.encode("X").ids[0]
    targets = Counter(int(t) for batch in batches for t in batch.targets.flatten() if t != -100)
    assert set(targets) == {capital} and all(batch.documents for batch in batches)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (replace(ATTACK, tokens=40), r"--tokens 40: a step of .* takes a multiple of model\.context, 16 tokens, and"),
        (replace(MIXED, tokens=16), "--tokens 16: .* 16 tokens, and at least 32"),
    ],
)
def test_tokens_that_make_no_step_are_an_error(corpus, attack, message):
    with pytest.raises(ValueError, match=message):
        AttackData(corpus, config_for(), attack)


def test_a_category_without_training_text_is_an_error(tmp_path):
    records = [record for record in mixed_records() if (record["category"], record["split"]) != ("es", "train")]
    with pytest.raises(ValueError, match="no text of category es in its split train"):
        AttackData(build(tmp_path / "corpus", records), config_for(), ATTACK)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "a number above 0, got 0.0"),
        ({"lr": -1e-3}, "a number above 0"),
        ({"lr": math.inf}, "a number above 0"),
        ({"lr": math.nan}, "a number above 0"),
        ({"schedule": "linear"}, "unknown schedule 'linear' of an attack; known: constant, cosine"),
        ({"warmup": 4}, "got 4 of 4"),
        ({"steps": 0, "warmup": 0}, "got 0 of 0"),
        ({"parts": ((),)}, "forget has no category"),
        ({"weight_decay": -0.1}, "weight_decay and clip of an attack are 0 or more, got -0.1"),
        ({"clip": math.nan}, "weight_decay and clip of an attack are 0 or more"),
    ],
)
def test_values_that_make_no_attack_are_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        replace(ATTACK, **values)


def test_attacks_of_one_name_take_the_same_steps():
    """A sweep's rows and claims join attacks by name."""
    constant = replace(ATTACK, schedule="constant", steps=64)
    assert str(ATTACK) == "forget, cosine over 4, lr 0.01, warm-up 1" and str(constant) == "forget, constant, lr 0.01"
    assert str(replace(constant, steps=256)) == str(constant), "the shorter is the beginning of the longer"
    assert str(replace(constant, warmup=25)) == "forget, constant, lr 0.01, warm-up 25"
    assert str(replace(constant, warmup=0)) == "forget, constant, lr 0.01, warm-up 0"
    assert str(replace(ATTACK, steps=30, warmup=3)) == "forget, cosine over 30, lr 0.01"
    for change in ({"weight_decay": 0.1}, {"clip": 0.0}, {"seed": 1}, {"data": "adjacent"}, {"lr": 0.02}):
        assert str(replace(constant, **change)) != str(constant), change


def test_learning_rates():
    cosine = replace(ATTACK, lr=1.0, steps=6, warmup=2)
    assert [cosine.learning_rate(step) for step in range(6)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]
    )
    constant = replace(cosine, schedule="constant")
    assert [constant.learning_rate(step) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_evaluated_steps_are_powers_of_two_and_the_budgets():
    assert evaluated_steps(1) == (0, 1)
    assert evaluated_steps(16) == (0, 1, 2, 4, 8, 16)
    assert evaluated_steps(20, (5, 20, 50)) == (0, 1, 2, 4, 5, 8, 16, 20)


def reached(*losses: float, steps=(0, 1, 2, 4, 8), attack: Attack = ATTACK) -> list[Reached]:
    return [Reached(attack, step, loss) for step, loss in zip(steps, losses, strict=False)]


def test_the_worst_case_is_the_lowest_loss_so_far_of_any_attack():
    slow, fast = reached(5, 4.5, 4, 3.5, 2, attack=MIXED), reached(5, 3, 4, 4.5, math.nan)
    for order in (slow + fast, fast + slow):
        worst = worst_case(order)
        assert {step: r.loss for step, r in worst.items()} == {0: 5, 1: 3, 2: 3, 4: 3, 8: 2}
        assert (worst[4].attack, worst[4].step, worst[8].attack) == (ATTACK, 1, MIXED)


def test_the_worst_case_never_rises():
    torch.manual_seed(0)
    losses = [r for attack in (ATTACK, MIXED) for r in reached(*torch.rand(5).tolist(), attack=attack)]
    values = [r.loss for r in worst_case(losses).values()]
    assert values == sorted(values, reverse=True) and len(values) == 5


def test_a_longer_attack_says_nothing_of_fewer_steps():
    worst = worst_case([*reached(5, 5), *reached(5, 1, steps=(0, 8), attack=MIXED)])
    assert {step: r.loss for step, r in worst.items()} == {0: 5, 1: 5, 8: 1}


def test_no_finite_loss_is_an_error():
    with pytest.raises(ValueError, match="diverged before it was attacked"):
        worst_case(reached(math.nan, math.inf))


def of_documents(losses: list[float], targets: list[int], error: float | None = None) -> Reached:
    return Reached(ATTACK, 1, sum(losses) / sum(targets), error, documents=Documents(tuple(losses), tuple(targets)))


def test_a_difference_that_is_the_same_for_every_document_has_no_error():
    targets = [1, 3, 4]
    other = of_documents([1.0, 9.0, 2.0], targets, 0.9)
    mine = of_documents([1.25, 9.75, 3.0], targets, 0.9)
    assert difference(mine, other) == (0.25, 0.0, True)


def test_the_error_of_a_difference_by_hand():
    """Differences of 1 and 7 over 1 and 3 targets: the mean is 2, which misses them by -1 and 1, and the error is
    sqrt(2 / 1 * (1 + 1)) / 4."""
    mine, other = of_documents([6.0, 8.0], [1, 3], 0.3), of_documents([5.0, 1.0], [1, 3], 0.4)
    assert difference(mine, other) == (2.0, 0.5, True)
    assert difference(other, mine) == (-2.0, 0.5, True)
    assert difference(of_documents([6.0], [2]), of_documents([5.0], [2])) == (0.5, None, True)


def test_losses_without_documents_are_those_of_independent_samples():
    mine, other = of_documents([6.0, 8.0], [1, 3], 0.3), of_documents([5.0, 1.0], [1, 3], 0.4)
    expected = (2.0, pytest.approx(0.5), False)
    assert difference(mine._replace(documents=None), other) == expected
    assert difference(mine, other._replace(documents=None)) == expected
    assert difference(mine, other._replace(documents=Documents((5.0, 1.0), (2, 2)))) == expected
    assert difference(mine._replace(documents=None), other._replace(error=None)) == (2.0, None, False)


@pytest.mark.parametrize(("loss", "step"), [(6.0, 0), (5.0, 0), (4.9, 1), (3.0, 1), (2.5, 8), (2.0, 8), (1.9, None)])
def test_the_relearned_step_is_the_first_evaluated_one(loss, step):
    assert relearned(worst_case(reached(5, 3, 4, 4.5, 2)), loss) == step
