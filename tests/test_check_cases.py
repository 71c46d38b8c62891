"""Losses as people write them get the verdict that they deserve, and the cause of it."""

import check_cases
import pytest
import torch

from funcloss.laws import BATCHES, LAWS, WORKS, WRONG, Verdict, adapt, check, try_law, verdict_of

RIGHT = {
    "plain_cross_entropy": {},
    "focal_from_cross_entropy": {},
    "focal_of_small_gamma": {},
    "smoothed_by_hand": {},
    "brier": {},
    "mean_absolute": {},
    "truncated_power": {},
    "one_against_all": {},
    "crammer_singer": {},
    "structured_perceptron": {},
    "weighted_by_gather": {"class_weights": {9: 5.0}},
    "squared_earth_mover": {},
    "expected_cost": {},
    "cost_by_row": {},
    "prior_corrected": {},
    "entropy_regularised": {},
    "mean_of_batch": {},
    "with_mask": {},
    "LabelSmoothing": {},
    "coral_by_hand": {},
    "expected_grade": {},
    "costly_mistakes": {},
    "only_the_hard": {},
    "safely_clamped": {},
    "of_log_probs": {},
    "of_distributions": {},
    "sharp": {},
    "squared_log_error": {"task": "regression"},
    "huber": {"task": "regression"},
    "pinball": {"task": "regression"},
    "log_cosh": {"task": "regression"},
    "epsilon_insensitive": {"task": "regression"},
    "tukey": {"task": "regression"},
    "root_mean_squared": {"task": "regression"},
    "logistic": {"task": "binary"},
    "binary_focal": {"task": "binary"},
    "hinge_of_signs": {},
    "soft_dice": {},
    "from_teacher": {},
    "cosine": {"task": "embedding"},
    "contrastive": {},
    "triplet": {},
}

# name: (what it is given, the root cause, a part of the detail or of the cure)
ON_BATCHES = {
    "indexed_weight": (
        {"class_weights": {9: 5.0}},
        "per-sample gradients",
        "W.gather(0, y.reshape(-1)).reshape(y.shape), not W[y]",
    ),
    "doubled_in_place": ({}, "vmap", "torch.where(labels == c, a, b)"),
    "focal_of_floats": ({}, "dtype", ".to(predictions.dtype)"),
    "picked_by_position": ({}, "vmap", "not [arange(len(labels)), labels]"),
    "one_hot_of_torch": ({}, "per-sample gradients", "one-hots by comparison"),
    "loop_over_classes": ({}, "vmap", "no .tolist() and no loop over a tensor's values"),
    "focal_by_view": ({}, "vmap", "it needs a batch axis"),
    "sum_of_batch": ({}, "vmap", "dim=-1"),
    "focal_of_a_detached_weight": ({}, "gradgradcheck", "with second derivatives"),
    "rows_of_costs": ({}, "per-sample gradients", "COSTS.to(logits.dtype).index_select(0, labels"),
    "CostRows": (
        {},
        "per-sample gradients",
        "self.costs.index_select(0, labels.reshape(-1)).reshape(*labels.shape, -1)",
    ),
}

NINE = {"class_weights": {9: 2.0}}
OF_VALUES, OF_BITS = {"task": "regression"}, {"task": "binary"}
BROKEN = {
    "minus_cross_entropy": ({}, "direction", "change its sign"),
    "of_the_next_class": ({}, "direction", "each in its own place"),
    "to_the_uniform": ({}, "direction", "certain and right costs 18, certain and wrong 18"),
    "nll_of_logits": ({}, "direction", "take log_softmax of the logits first"),
    "extra_softmax": ({}, "not flat", "leave out the extra softmax"),
    "focal_of_extra_softmax": ({}, "not flat", "cross-entropy of softmax(logits)"),
    "extra_softmax_in_mean": ({}, "not flat", "leave out the extra softmax"),
    "sigmoid_before_softmax": ({}, "not flat", "leave out the extra sigmoid"),
    "smoothed_extra_softmax": ({}, "not flat", "leave out the extra softmax"),
    "nll_of_probabilities": ({}, "not flat", "without a logarithm"),
    "labels_from_one": ({}, "runs", "labels count from 0"),
    "sigmoid_twice": (OF_BITS, "not flat", "leave out the extra sigmoid"),
    "clamped_probabilities": ({}, "not flat", "surest and wrong"),
    "clipped_loss": ({}, "not flat", "surest and wrong"),
    "constant_in_regression": (OF_VALUES, "has a gradient", "see detach in its code"),
    "one_for_all": (OF_VALUES, "has a gradient", "0 everywhere"),
    "without_gradient": ({}, "has a gradient", "see no_grad in its code"),
    "detached_logits": ({}, "has a gradient", "see detach in its code"),
    "through_numpy": ({}, "has a gradient", "numpy in its code"),
    "zero_one": ({}, "has a gradient", "see argmax in its code"),
    "rounded": (OF_VALUES, "has a gradient", "see round in its code"),
    "as_integers": (OF_VALUES, "has a gradient", "see long in its code"),
    "rebuilt_tensor": ({}, "has a gradient", "see torch.tensor"),
    "gradients_left_off": ({}, "pure", "with torch.no_grad():"),
    "focal_of_a_root": ({}, "saturation", "its own class alone at 20 its gradient is nan"),
    "root_of_square": (OF_VALUES, "saturation", "where predictions equal targets"),
    "relative": (OF_VALUES, "saturation", "at targets of 0"),
    "unprotected_distance": ({}, "saturation", "where vectors are alike"),
    "naive_softmax": ({}, "extremes", "log space"),
    "log_of_softmax": ({}, "extremes", "log space"),
    "log_of_probability": ({}, "extremes", "log space"),
    "softmax_over_the_batch": ({}, "map over examples", "see softmax(0 in its code"),
    "scaled_by_batch_mean": ({}, "map over examples", "see mean() in its code"),
    "standardised": ({}, "map over examples", "std in its code"),
    "hardest_half": ({}, "map over examples", "see median() in its code"),
    "scaled_by_item": ({}, "map over examples", "item() in its code"),
    "branches_on_the_batch": ({}, "map over examples", "see max() in its code"),
    "a_value_per_logit": ({}, "map over examples", "not one value per example"),
    "mean_then_mask": (NINE, "cost effect", "scales whole batches"),
    "divided_by_weights": (NINE, "cost effect", "divided out by the sum of the weights"),
    "mean_of_torch": ({}, "cost effect", "alone it does nothing"),
    "class_three_dropped": ({}, "cost effect", "class 3 weighs 0"),
    "only_the_nine": ({}, "cost effect", "classes 0, 1, 2, 3, 4 ... weigh 0"),
    "weighted_by_prediction": ({}, "cost effect", "not by what is predicted"),
    "weight_of_two": ({"class_weights": {9: 4.0}}, "cost effect", "its cost says 4.00"),
    "weight_by_confidence": (NINE, "cost effect", "the factor is no constant"),
    "cost_by_column": ({}, "cost effect", "cost_matrix.index_select(0, labels.reshape(-1))"),
    "weights_divide": ({}, "cost effect", "does not do what it says"),
    "next_weight": ({}, "cost effect", "does not do what it says"),
    "RunningScale": ({}, "pure", "self in its code"),
    "Annealed": ({}, "pure", "the second answer to one question"),
    "counts_in_a_global": ({}, "pure", "append in its code"),
    "noisy": ({}, "pure", "rand in its code"),
    "edits_its_logits": ({}, "pure", "it changed what it was given"),
    "edits_its_labels": ({}, "pure", "it changed what it was given"),
    "axis_of_examples": ({}, "runs", "axis 0 is the batch"),
    "float_labels": ({}, "runs", "labels are integers"),
    "masks_by_product": ({}, "masked = dropped", "never multiply by 0"),
    "masks_nothing": ({}, "masked = dropped", "a masked value"),
    "wrong_sign": (OF_VALUES, "direction", "change its sign"),
    "sum_for_difference": (OF_VALUES, "direction", "the targets' own, against another's"),
    "signed_error": (OF_VALUES, "direction", "costs 1.6, certain and wrong 1.6"),
    "inverse_distance": (OF_VALUES, "direction", "change its sign"),
    "flipped_bits": (OF_BITS, "direction", "change its sign"),
    "swapped_sign": ({}, "direction", "change its sign"),
    "dice_score": ({}, "direction", "change its sign"),
    "similarity": ({"task": "embedding"}, "direction", "change its sign"),
    "far_is_near": ({}, "direction", "change its sign"),
    "teacher_to_itself": ({}, "direction", "each in its own place"),
    "ForgetsGradient": (OF_VALUES, "gradcheck", "Jacobian mismatch"),
}


def judged(name: str, options: dict, compiled: bool) -> Verdict:
    case = adapt(getattr(check_cases, name), **options).case
    if compiled:
        return verdict_of(check(case))
    return verdict_of([try_law(law, case) for law in LAWS if law not in ("compile", "inductor")])


# The law that compiles takes as long as all others, and is the root cause of none.
COMPILED = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_loss_works_everywhere(name, compiled):
    verdict = judged(name, RIGHT[name], compiled)
    assert (verdict.degree, verdict.causes) == (WORKS, ())
    assert verdict.sentence.startswith("works everywhere: ")


OTHERS = [(BATCHES, *row) for row in ON_BATCHES.items()] + [(WRONG, *row) for row in BROKEN.items()]
TRIED = [
    pytest.param(degree, name, case, compiled, id=f"{name}-{compiled}", marks=marks)
    for degree, name, case in OTHERS
    for compiled, marks in ((False, []), (True, [pytest.mark.slow]))
    if not compiled or degree == BATCHES  # what is wrong already is no better compiled
]


def reads_lists_under_grad() -> bool:
    """Return whether this torch lets a loss call .tolist() under torch.func.grad; 2.6 does not."""
    try:
        torch.func.grad(lambda x: x * torch.ones(1).tolist()[0])(torch.ones(()))
    except RuntimeError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")
@pytest.mark.parametrize(("degree", "name", "case", "compiled"), TRIED)
def test_another_loss_is_told_its_root_cause_and_the_cure(degree, name, case, compiled):
    options, law, said = case
    if name == "loop_over_classes" and not reads_lists_under_grad():
        degree, law = WRONG, "gradcheck"  # funcloss-train differentiates by torch.func.grad
    verdict = judged(name, options, compiled)
    root = verdict.causes[0]
    assert (verdict.degree, root.law) == (degree, law), verdict
    assert said in f"{verdict.sentence} -> {root.advice}"
    assert verdict.sentence.startswith(f"{degree}: ")


def test_what_follows_from_the_root_cause_is_no_finding_of_its_own():
    for name in ("Annealed", "gradients_left_off", "without_gradient"):
        findings = check(adapt(getattr(check_cases, name)).case)
        assert len(verdict_of(findings).causes) == 1
        assert len([f for f in findings if f.verdict == "fail"]) > 3


def test_the_cases_are_many_and_each_is_tried():
    written = {
        name
        for name, thing in vars(check_cases).items()
        if getattr(thing, "__module__", "") == "check_cases" and name not in ("ce",)
    }
    assert written == {*RIGHT, *ON_BATCHES, *BROKEN}
    assert len(BROKEN) >= 40
    assert len(RIGHT) >= 20


def test_what_a_loss_does_to_torch_is_undone():
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()

    def careless(logits, labels):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(threads + 1)
        return check_cases.gradients_left_off(logits, labels)

    check(adapt(careless).case)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
