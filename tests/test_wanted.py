"""What was asked for, line by line, and the defects of Betty that must not come back, each with the tests that prove it.

The table is printed at the end of every run that includes this file (`conftest.py`), with the outcome that each test had in that run."""

import ast
import re
from collections import Counter

import pytest

from tests.repo import ROOT

# {what was asked for: [tests, as file::test or file::test[parameter], without the folder and `.py`]}
WANTED = {
    "Problem: module, optimizer, loader, configure hooks or arguments": ["test_betty_programs::test_logistic_regression_hpo"],
    "Problem: the loss is a tensor": ["test_program::test_a_loss_that_is_not_a_scalar", "test_betty_programs::test_implicit_maml"],
    "Problem: the loss is a dictionary with metrics": [
        "test_training::test_defect_10_adamw_and_a_loss_dictionary_below",
        "test_engine::test_defect_14_dict_metrics",
    ],
    "Problem: config": ["test_engine::test_defect_13_options_are_read_when_they_are_used"],
    "Problem: name, self.<other level>": [
        "test_program::test_names_that_would_hide_something",
        "test_betty_programs::test_early_names_and_the_ways_to_set_things",
    ],
    "Problem: scheduler": ["test_training::test_defect_11_every_scheduler"],
    "Problem: callbacks": ["test_training::test_callbacks_come_in_order_and_as_often_as_they_should"],
    "Engine: problems, u2l and l2u dependencies": [
        "test_program::test_an_unknown_level_in_the_dependencies",
        "test_betty_programs::test_early_names_and_the_ways_to_set_things",
    ],
    "Engine: path finding": [
        "test_sweep::test_lower_solves_grow_linearly_with_the_stages_of_a_diamond",
        "test_sweep::test_the_shares_of_the_paths_add_up",
        "test_betty_programs::test_learning_by_ignoring",
    ],
    "Engine: validation": ["test_engine::test_validation_sees_evaluation_mode_and_may_differentiate"],
    "Engine: config": ["test_engine::test_defect_14_early_stopping", "test_engine::test_summary_names_everything"],
    "Engine: run": ["test_program::test_a_run_and_single_steps_give_the_same_bits"],
    "ImplicitProblem": ["test_methods::test_ridge_regression_against_the_formula"],
    "IterativeProblem": ["test_unroll::test_every_optimizer_against_central_differences_of_the_whole_program"],
    "IterativeProblem with implicit levels in one engine": [
        "test_unroll::test_iterative_and_implicit_levels_in_one_program",
        "test_betty_programs::test_iterative_and_implicit_levels_in_one_engine",
    ],
    "Finite difference (DARTS)": [
        "test_first_order::test_the_direction_is_that_of_the_exact_hypergradient",
        "test_betty_programs::test_logistic_regression_hpo[darts]",
    ],
    "Neumann series": [
        "test_methods::test_neumann_sums_as_many_terms_as_betty",
        "test_betty_programs::test_logistic_regression_hpo[neumann]",
    ],
    "Conjugate gradient": [
        "test_methods::test_ridge_regression_against_the_formula[cg]",
        "test_betty_programs::test_logistic_regression_hpo[cg]",
    ],
    "Reverse-mode iterative differentiation": [
        "test_unroll::test_maml_against_central_differences",
        "test_betty_programs::test_logistic_regression_hpo[itd]",
    ],
    "Gradient accumulation": ["test_training::test_clipping_and_accumulation_are_the_plain_loop"],
    "fp16 and bf16": [
        "test_training::test_training_in_fp16_is_the_loop_of_the_torch_documentation",
        "test_training::test_hypergradients_in_half_precision_agree_with_those_in_single",
    ],
    "Distributed data parallel": ["test_distributed::test_two_processes_give_what_one_gives_with_twice_the_batch"],
    "TensorBoard": ["test_engine::test_tensorboard_keeps_scalars_histograms_graph_and_options"],
    "wandb": ["test_engine::test_defect_14_wandb"],
    "stdout": ["test_engine::test_defect_14_dict_metrics"],
    "Hyperparameter optimization": ["test_betty_programs::test_logistic_regression_hpo"],
    "Neural architecture search": ["test_betty_programs::test_architecture_search"],
    "Data reweighting": ["test_betty_programs::test_learning_to_reweight"],
    "Domain adaptation for pretraining and finetuning": ["test_betty_programs::test_learning_by_ignoring"],
    "Implicit MAML": ["test_betty_programs::test_implicit_maml"],
    "MAML": ["test_unroll::test_maml_learns", "test_unroll::test_maml_against_central_differences"],
    "Reinforcement learning": ["test_betty_programs::test_ppo"],
    "Early names: Config(steps=5)": ["test_betty_programs::test_early_names_and_the_ways_to_set_things"],
}

DEFECTS = {
    1: ["test_unroll::test_defect_1_iterative_differentiation_runs"],
    2: [
        "test_methods::test_defect_2_cg_does_not_depend_on_cg_alpha_and_stops_at_convergence",
        "test_methods::test_defect_2_cg_has_a_curvature_guard_damping_and_a_tolerance",
    ],
    3: ["test_methods::test_defect_3_neumann_with_the_default_alpha_does_not_diverge_silently"],
    4: ["test_sweep::test_defect_4_a_middle_level_with_a_hypergradient_of_its_own"],
    5: [
        "test_first_order::test_defect_5_weights_do_not_drift",
        "test_first_order::test_defect_5_an_interrupt_leaves_everything_in_place",
        "test_first_order::test_defect_5_a_training_hypergradient_leaves_the_lower_level_alone",
        "test_first_order::test_defect_5_both_passes_share_the_dropout_mask",
    ],
    6: [
        "test_first_order::test_defect_6_the_multitask_shift_is_off_by_default",
        "test_first_order::test_defect_6_when_asked_for_it_moves_the_level_by_the_documented_amount",
        "test_first_order::test_defect_6_the_shift_is_undone_by_going_back",
    ],
    7: ["test_training::test_defect_7_rolling_back_is_virtual_step_upper_step_real_step"],
    8: [
        "test_first_order::test_defect_8_sama_refuses_an_optimizer_it_does_not_know",
        "test_first_order::test_defect_8_a_subclass_may_have_another_update",
        "test_first_order::test_defect_8_sama_is_not_zero_at_the_first_step",
    ],
    9: ["test_training::test_defect_9_the_optimizer_is_used_as_it_is"],
    10: [
        "test_training::test_defect_10_adamw_and_a_loss_dictionary_below",
        "test_training::test_defect_10_frozen_and_unused_parameters_and_a_linear_one",
        "test_training::test_defect_10_an_upper_loss_that_uses_its_own_parameters",
        "test_training::test_defect_10_second_derivatives_through_attention",
    ],
    11: [
        "test_training::test_defect_11_config_and_dependencies_may_be_left_out",
        "test_training::test_defect_11_batches_of_any_nesting",
        "test_training::test_defect_11_a_generator_that_ends_says_so",
        "test_training::test_defect_11_a_custom_step_needs_no_optimizer",
        "test_training::test_defect_11_every_scheduler",
        "test_program::test_a_missing_loader",
    ],
    12: ["test_program::test_defect_12_what_was_silent_is_said"],
    13: [
        "test_engine::test_defect_13_running_the_engine_cell_again",
        "test_engine::test_defect_13_the_edges_of_a_live_engine",
        "test_engine::test_defect_13_edges_that_change_between_hypergradient_and_descent",
        "test_engine::test_defect_13_a_refused_change_of_edges_changes_nothing",
        "test_engine::test_defect_13_options_are_read_when_they_are_used",
    ],
    14: [
        "test_engine::test_defect_14_early_stopping",
        "test_engine::test_defect_14_early_stopping_of_a_metric_that_grows",
        "test_engine::test_defect_14_early_stopping_needs_its_metric",
        "test_engine::test_defect_14_early_stopping_goes_back_with_the_program",
        "test_engine::test_defect_14_dict_metrics",
        "test_engine::test_defect_14_wandb",
        "test_distributed::test_defect_14_the_distributed_sampler_repeats_no_batch",
        "test_distributed::test_defect_14_torchrun",
        "test_distributed::test_defect_14_accelerate_starts_all_processes_alike_and_one_writes_the_log",
    ],
    15: [
        "test_engine::test_defect_15_host_syncs",
        "test_engine::test_defect_15_host_syncs_are_seen_where_there_are_some",
        "test_checkpoint::test_killed_and_resumed",
    ],
    16: [
        "test_betty_programs::test_defect_16_no_document_sets_a_method_where_it_has_no_effect",
        "test_betty_programs::test_defect_16_a_misplaced_method_in_a_document_is_found",
        "test_notebooks::test_notebook",
    ],
}

TABLE = {**WANTED, **{f"Betty's defect {number}": tests for number, tests in DEFECTS.items()}}


def named(test, found):
    "The ids among `found` that a name of the table stands for: the test itself, with all its parameters where none is given"
    return [node for node in found if node == test or node.startswith(test + "[")]


def short(nodeid):
    "tests/test_x.py::test_y[z] -> test_x::test_y[z]"
    return re.sub(r"^(?:.*/)?(\w+)\.py::", r"\1::", nodeid)


def table(outcomes):
    "The lines of the table, from {id of a test: its outcome}"
    outcomes = {short(nodeid): outcome for nodeid, outcome in outcomes.items()}
    lines = []
    for item, tests in TABLE.items():
        lines.append(item)
        for test in tests:
            counts = Counter(outcomes[node] for node in named(test, outcomes))
            told = ", ".join(f"{n} {outcome}" if len(counts) > 1 or n > 1 else outcome for outcome, n in sorted(counts.items()))
            lines.append(f"    {told or 'not run':12} {test}")
    return lines


@pytest.fixture
def collected(request):
    "The tests in the repository: their names as they are written, and with parameters those that pytest has collected in this run"
    written = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        written += [
            f"{path.stem}::{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
    return written, [short(item.nodeid) for item in request.session.items]


def test_every_test_of_the_table_exists(collected):
    written, items = collected
    missing = []
    for item, tests in TABLE.items():
        for test in tests:
            function = test.split("[")[0]
            parameters = [node for node in items if node.startswith(function + "[")]
            if function not in written or ("[" in test and parameters and test not in parameters):
                missing.append(f"{item}: {test}")
    assert not missing, "tests/test_wanted.py names tests that are not there:\n  " + "\n  ".join(missing)


def test_every_test_of_a_defect_is_in_the_table(collected):
    assert sorted(DEFECTS) == list(range(1, 17))
    found = [(test, re.search(r"::test_defect_(\d+)_", test)) for test in collected[0]]
    left_out = [test for test, number in found if number and test not in DEFECTS[int(number[1])]]
    assert not left_out, "name them under their defect in tests/test_wanted.py:\n  " + "\n  ".join(left_out)


def test_the_table_tells_outcomes():
    lines = table({"tests/test_betty_programs.py::test_ppo": "failed"})
    assert lines[lines.index("Reinforcement learning") + 1].split() == ["failed", "test_betty_programs::test_ppo"]
    assert lines[lines.index("Early names: Config(steps=5)") + 1].split()[:2] == ["not", "run"]
