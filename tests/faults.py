"""Plant deliberate faults in the library, one at a time; the tests must catch each.

Each fault replaces one piece of source in a copy of the repository, runs the tests that should see it and
stops at the first that fails, so those tests must pass without a fault: run them first. Prints which test
caught which fault; exits with 1 if a fault survives or its source is no longer there.

    python tests/faults.py              # all faults
    python tests/faults.py envelope     # those with "envelope" in their name
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FORMATS, CONTRACTION = "mumoe_tensor/formats", "mumoe_tensor/contraction"


@dataclass(frozen=True)
class Fault:
    """`old` in `file` becomes `new`; `tests` are the files, or functions of them, that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    Fault("TR: transposed bond in the output core", f"{FORMATS}/tensor_ring.py",
          'last = Factor(f"{a} {o} {b}", memory_order=f"{b} {a} {o}")',
          'last = Factor(f"{b} {o} {a}", memory_order=f"{b} {a} {o}")', "properties::test_property"),
    Fault("TT: two inner bonds swapped", f"{FORMATS}/tensor_train.py",
          "Factor(f\"{a} {m} {b}\"", "Factor(f\"{b} {m} {a}\"", "properties::test_property"),
    Fault("Hadamard: to_tensorly gives ones for the identity", f"{FORMATS}/hadamard.py",
          "tl.eye(factors[-1].shape[1], **", "tl.ones((factors[-1].shape[1],) * 2, **",
          "properties::test_property"),
    Fault("CP: the weights of a container are dropped", f"{FORMATS}/cp.py",
          "return [container.weights, *container.factors]", "return [None, *container.factors]",
          "properties::test_property"),
    Fault("formats: the batch's name taken for a bond", f"{FORMATS}/base.py",
          "if bond == BATCH or re", "if re",
          "formats/test_base::test_a_bad_declaration_is_refused_where_it_breaks"),
    Fault("formats: equal by the class alone", f"{FORMATS}/base.py",
          "return hash((type(self), self._settings()))", "return hash(type(self))",
          "formats/test_registry::test_a_changed_setting_meets_no_earlier_declaration"),
    Fault("formats: settings left out of equality", f"{FORMATS}/base.py",
          " and self._settings() == other._settings()", "",
          "formats/test_registry::test_equal_means_the_same_class_and_the_same_settings"),
    Fault("configs: a format written without its settings", f"{FORMATS}/registry.py",
          "{\"name\": format.name, **settings}", "{\"name\": format.name}",
          "formats/test_registry::test_an_entry_has_the_settings_that_differ"),
    Fault("formats: registered unseen", f"{FORMATS}/registry.py",
          "        declared.declaration(levels)\n", "        pass\n",
          "formats/test_base::test_a_bad_declaration_is_refused_where_it_breaks"),
    Fault("testing: a problem's inputs not those of its seed", "mumoe_tensor/testing/strategies.py",
          "np.random.default_rng(self.seed)", "np.random.default_rng()",
          "testing/test_strategies::test_a_problem_can_be_pasted_back"),
    Fault("bias row dropped", f"{CONTRACTION}/execute.py",
          "(row, left, right)\n", "(0 * row, left, right)\n", "properties::test_property"),
    Fault("bias taken from the first row", f"{CONTRACTION}/execute.py",
          "operations.select(weights, bias.axis, -1)", "operations.select(weights, bias.axis, 0)",
          "properties::test_property"),
    Fault("levels swapped", "mumoe_tensor/multilinear.py",
          "for x in (*coefficients, z)]\n    y =", "for x in (*coefficients[::-1], z)]\n    y =",
          "properties::test_property"),
    Fault("expert_matrix: index of the levels reversed", "mumoe_tensor/multilinear.py",
          "of_mode = dict(zip(network.output, entries, strict=False))",
          "of_mode = dict(zip(network.output, entries[::-1], strict=False))", "properties::test_property"),
    Fault("leading shape flattened", "mumoe_tensor/multilinear.py",
          "return y.reshape(*leading, weight.shape[-1])", "return y", "properties::test_property"),
    Fault("layout: copies never seen as needed", f"{CONTRACTION}/network.py",
          'return "summed" not in runs or', "return True or",
          "properties::test_property"),
    Fault("layout: order within summed axes not compared", f"{CONTRACTION}/layout.py",
          "and summed == b_summed and shared == b_shared", "and shared == b_shared",
          "properties::test_property"),
    Fault("JAX: x64 left switched on", "mumoe_tensor/backend.py",
          'jax.config.update("jax_enable_x64", x64)', "pass",
          "backends::test_threads_that_load_jax_at_once_leave_float64_off"),
    Fault("JAX: loaded by several threads at once", "mumoe_tensor/backend.py",
          "with _loading:", "if True:", "backends::test_threads_that_load_jax_at_once_leave_float64_off"),
    Fault("masked arrays are taken for their data", "mumoe_tensor/backend.py",
          'is_array = bool(arrays) and not is_refused', 'is_array = bool(arrays)',
          "arrays::test_arrays_that_are_refused"),
    Fault("labels of floats are cut off", "mumoe_tensor/analysis/labels.py",
          "if values.is_floating_point() or values.is_complex():", "if values.is_complex():",
          "arrays::test_labels_of_every_dtype"),
    Fault("TensorLy's backend left changed", "mumoe_tensor/backend.py",
          "local.backend = before", "pass", "backends::test_no_public_call_changes_a_setting_of_its_user"),
    Fault("search: a bound drops what may be the best", f"{CONTRACTION}/order.py",
          "if total < (best", "if 2 * total < (best",
          "contraction/test_planner::test_flops_are_the_fewest_of_all_pairwise_orders"),
    Fault("search: elementwise products cost twice", f"{CONTRACTION}/order.py",
          "self.size(union) if kept == union else 2 * self.size(union)", "2 * self.size(union)",
          "contraction/test_planner::test_flops_are_the_fewest_of_all_pairwise_orders"),
    Fault("search: 'factorized' forms the weight", f"{CONTRACTION}/order.py",
          'if implementation == "factorized" and whole & (whole - 1) else 0', "if False else 0",
          "contraction/test_planner::test_factorized_never_forms_the_weight"),
    Fault("search: memory limit ignored", f"{CONTRACTION}/order.py",
          "self.size(kept) > self.limit", "False",
          "contraction/test_planner::test_memory_limit_bounds_every_intermediate_or_raises"),
    Fault("search: named as if none were greedy", f"{CONTRACTION}/order.py",
          '"greedy" if parts is not fixed else "vectors first"', '"vectors first"',
          "contraction/test_planner::test_the_search_is_named"),
    Fault("search: every batch size is searched anew", "mumoe_tensor/multilinear.py",
          "batch = 1 << max(batch - 1, 0).bit_length()", "pass",
          "contraction/test_planner::test_batches_of_about_the_same_size_share_a_plan"),
    Fault("plan: a product counts one FLOP a term", f"{CONTRACTION}/plan.py",
          'flops=volume * (1 if step.kind == "mul" else 2)', "flops=volume",
          "cost::test_reference_flops_are_near_the_fewest"),
    Fault("plan: bias row counted in its product", f"{CONTRACTION}/plan.py",
          'extent["i"] -= 1', "pass",
          "contraction/test_planner::test_flops_are_the_fewest_of_all_pairwise_orders"),
    Fault("plan: nothing saved for the backward pass", f"{CONTRACTION}/plan.py",
          "saved += elements if operand.is_stored_anew(sizes) else alive.get(operand.position, 0)",
          "saved += elements if operand.is_stored_anew(sizes) else 0",
          "contraction/test_planner::test_saved_is_what_autograd_keeps"),
    Fault("plan: folded products still counted", f"{CONTRACTION}/plan.py",
          "return tuple(s for s in self._planned if not (s.constant and self.fold_weights))",
          "return self._planned", "contraction/test_planner::test_constants_are_reported_apart"),
    Fault("plan: peak forgets the operands", f"{CONTRACTION}/plan.py",
          "live = sum(alive.values()) + copied", "live = alive[position]",
          "contraction/test_planner::test_peak_counts_copies_of_weights"),
    Fault("plan: 'auto' never forms the weight", f"{CONTRACTION}/plan.py",
          'if implementation in (name, "auto"):', "if implementation == name or name == 'factorized':",
          "contraction/test_planner::test_auto_takes_the_cheaper_and_says_which"),
    Fault("cost: a term of Tucker's closed form missing", f"{FORMATS}/tucker.py",
          "return 2 * (projections + core)", "return 2 * projections",
          "cost::test_reference_flops_equal_the_closed_form_of_the_literature"),
    Fault("cost: the chain of the ring left out", f"{FORMATS}/tensor_ring.py",
          "return 2 * (projections + matrices)", "return 2 * projections",
          "cost::test_reference_flops_equal_the_closed_form_of_the_literature"),
    Fault("cost: gate not counted", "mumoe_tensor/cost.py",
          "self.spec.weight_parameters + self.gate_parameters", "self.spec.weight_parameters",
          "cost::test_cost_counts_the_published_clip_heads"),
    Fault("spec: rank of an expert by the largest cut", "mumoe_tensor/spec.py",
          "return min(cuts)", "return max(cuts)",
          "spec::test_max_expert_rank_is_the_numerical_rank_of_random_experts"),
    Fault("spec: a fitted rank one too low", "mumoe_tensor/spec.py",
          "budget, lo=1, key=total)\n", "budget, lo=1, key=total) - 1\n",
          "spec::test_fit_rank_gives_the_published_clip_heads"),
    Fault("spec: a budget that the smallest rank meets is refused", "mumoe_tensor/spec.py",
          "if total(1) > budget:", "if total(1) >= budget:", "spec::test_a_budget_that_a_rank_meets"),
    Fault("FactorizedTensor: sizes of a bond not compared", "mumoe_tensor/tensors.py",
          "if sizes.setdefault(index, size) != size:", "if sizes.setdefault(index, size) < 0:",
          "errors::test_bad_call"),
    Fault("FactorizedTensor.random: variance not scaled", "mumoe_tensor/tensors.py",
          "(1 / (spec.in_features * terms)) ** (0.5 / sum(not f.optional for f in declared))", "1.0",
          "tensors::test_random_entries_have_variance_one_over_inputs"),
    Fault("decompose: a start ends at its first stall", "mumoe_tensor/decomposition/alternating.py",
          "return stalled == 2", "return stalled == 1", "decomposition/test_alternating::test_stop_rule"),
    Fault("decompose: the worst start kept", "mumoe_tensor/decomposition/__init__.py",
          "best = min(fits", "best = max(fits", "decomposition/test_decompose::test_exact_recovery"),
    Fault("decompose: Kronecker's parts not in pairs", "mumoe_tensor/decomposition/kronecker.py",
          "for axis in pair)]", "for axis in sorted(pair, reverse=True))]",
          "decomposition/test_kronecker::test_a_kronecker_product_is_rearranged_into_an_outer_product"),
    Fault("decompose: the blocks of Monarch transposed", "mumoe_tensor/decomposition/blocks.py",
          "parts.transpose(0, 2, 1, 3)", "parts.transpose(2, 0, 1, 3)",
          "decomposition/test_blocks::test_a_matrix_is_fitted_block_by_block"),
    Fault("decompose: padding has a weight", "mumoe_tensor/decomposition/alternating.py",
          "is None and not view.is_padded", "is None",
          "decomposition/test_decompose::test_padding_is_no_part_of_the_error"),
    Fault("decompose: terms not fitted to what the others leave", "mumoe_tensor/decomposition/sums.py",
          "seen[...] = best", "pass",
          "decomposition/test_summed::test_alternation_is_no_worse_than_one_term_after_the_other"),
    Fault("decompose: the sum fitted to all of each term", "mumoe_tensor/decomposition/alternating.py",
          "dense - sum(fitted[:k] + fitted[k + 1 :])", "dense",
          "decomposition/test_summed::test_a_weight_of_the_format_is_recovered"),
    Fault("decompose: whitened by the covariance, not its root", "mumoe_tensor/decomposition/whitening.py",
          "np.sqrt(values[held])", "values[held]",
          "decomposition/test_whitening::test_low_rank_is_the_best_for_the_outputs"),
    Fault("decompose: weights left out of the alternation", "mumoe_tensor/decomposition/__init__.py",
          "n_iter, tolerance, covariance)\n            _,", "n_iter, tolerance)\n            _,",
          "decomposition/test_whitening::test_conjugate_gradients_reach_what_whitening_gives"),
    Fault("entmax15: the half missing", "mumoe_tensor/gates.py",
          "0.5 * _centred(backend, rows)", "_centred(backend, rows)", "gates::test_nasty_rows"),
    Fault("layers: entmax15 without its half", "mumoe_tensor/nn/functional.py",
          ".mul_(0.5)", "",
          "nn/test_gate::test_entmax15_is_the_core_gate_with_its_first_and_second_derivatives"),
    Fault("layers: entmax15 stops too early", "mumoe_tensor/nn/functional.py",
          "step <= torch.finfo(u.dtype).eps", "step <= 0.1",
          "nn/test_gate::test_entmax15_in_float32_is_as_exact_as_the_core_gate"),
    Fault("contraction: bias row's gradient doubled", "mumoe_tensor/nn/backward.py",
          "gradient.sum(-2 if bias.side == 1 else -1)", "2 * gradient.sum(-2 if bias.side == 1 else -1)",
          "nn/test_contraction::test_gradients_are_those_of_the_plain_steps"),
    Fault("contraction: every product kept", "mumoe_tensor/nn/backward.py",
          "if not is_cheap and (position in depend_on_input or not recompute):", "if True:",
          "nn/test_contraction::test_kept_for_the_backward_pass"),
    Fault("contraction: second derivatives of what was kept", "mumoe_tensor/nn/contraction.py",
          "if torch.is_grad_enabled():\n            # The gradient", "if False:\n            # The gradient",
          "nn/test_contraction::test_second_derivatives"),
    Fault("sparse: taken in spite of hooks", "mumoe_tensor/nn/gate.py",
          " and not any(hooks)", "", "nn/test_sparse::test_when_it_is_taken"),
    Fault("sparse: taken for coefficients that are returned", "mumoe_tensor/nn/layers.py",
          "hidden = self.up(normed, coefficients, sparse_gradient=sparse_gradient)",
          "hidden = self.up(normed, coefficients, sparse_gradient=True)",
          "nn/test_sparse::test_layers_give_the_same_either_way"),
    Fault("sparse: rows start one late", "mumoe_tensor/nn/sparse.py",
          "return counts.cumsum(0) - counts", "return counts.cumsum(0)",
          "nn/test_sparse::test_product_and_gradients"),
    Fault("frozen: changed weights not seen", "mumoe_tensor/nn/frozen.py",
          "not all(map(_is_equal, sources, cache[0]))", "False",
          "nn/test_frozen::test_right_again_after_a_change"),
    Fault("frozen: batch norm's shift left out", "mumoe_tensor/nn/gate.py",
          "self.weight, shift)", "self.weight)",
          "nn/test_frozen::test_products_of_weights_are_made_once_and_save_flops"),
    Fault("frozen: batch norm of short dtypes rounded", "mumoe_tensor/nn/gate.py",
          "if z.dtype not in (torch.float32, torch.float64) or has_hooks(norm):", "if has_hooks(norm):",
          "nn/test_frozen::test_batch_norm_of_short_dtypes_is_as_exact_as_with_gradients"),
    Fault("frozen: products of weights folded in what torch records", "mumoe_tensor/calls.py",
          "torch.is_grad_enabled() or is_recorded())", "torch.is_grad_enabled())",
          "calls::test_nothing_is_frozen_in_what_torch_records"),
    Fault("layers: float64 rounded under autocast", "mumoe_tensor/nn/experts.py",
          "x if x.dtype == torch.float64 else x.to(dtype) for", "x.to(dtype) for",
          "nn/test_torch::test_autocast_leaves_float64_as_it_is"),
    Fault("published: statistics of batch norm in any shape", "mumoe_tensor/nn/published.py",
          "if any(of_levels != [(n,) for n in num_experts] for of_levels in shapes.values()):", "if False:",
          "nn/test_published::test_statistics_are_those_of_every_level_or_none"),
    Fault("layers: padded rows counted in batch norm", "mumoe_tensor/nn/norm.py",
          "mask.reshape(-1, 1).to(rows.dtype)", "torch.ones_like(mask.reshape(-1, 1), dtype=rows.dtype)",
          "nn/test_gate::test_mask_leaves_padded_tokens_out_of_batch_norm"),
    Fault("layers: outputs not scaled to those of a linear layer", "mumoe_tensor/nn/init.py",
          "factor.mul_((3 * in_features", "(3 * (3 * in_features",
          "nn/test_init::test_outputs_start_with_the_variance_of_a_linear_layer"),
    Fault("layers: batch norm of one process alone", "mumoe_tensor/nn/norm.py",
          "distributed.get_world_size() > 1", "False", "nn/test_distributed::test_two_processes_equal_one"),
    Fault("parallel: gradients of shared tensors not summed", "mumoe_tensor/nn/parallel.py",
          "ReduceFromGroup.apply(ctx.group, dy) if need", "dy if need",
          "nn/test_parallel::test_divided_equals_whole"),
    Fault("states with the earlier names of factors not read", "mumoe_tensor/nn/experts.py",
          'state[f"{prefix}factor_{key.removeprefix(old)}"] = state.pop(key)', "pass",
          "nn/test_torch::test_a_state_of_an_earlier_version_loads"),
    Fault("a mask of other shape is taken for one of batch norm", "mumoe_tensor/nn/gate.py",
          "if mask.shape != shape:", "if mask.numel() != shape.numel():",
          "nn/test_citizens::test_other_masks_are_refused"),
    Fault("what torch records depends on values", "mumoe_tensor/calls.py",
          "is_compiling() or is_jit_traced() or", "is_compiling() or", "nn/test_citizens::test_jit_trace"),
    Fault("a device without float64 is asked for it", "mumoe_tensor/nn/functional.py",
          "_HAS_FLOAT64[kind] = False", "_HAS_FLOAT64[kind] = True",
          "nn/test_citizens::test_layers_without_float64"),
    Fault("parallel: factors without the bond not shared", "mumoe_tensor/nn/parallel.py",
          "factors[k] = factor\n", "pass\n", "nn/test_parallel::test_divided_equals_whole"),
    Fault("parallel: outputs not summed", "mumoe_tensor/nn/parallel.py",
          "distributed.all_reduce(total, group=group)", "pass",
          "nn/test_parallel::test_divided_equals_whole"),
    Fault("parallel: the processes' own parameters kept", "mumoe_tensor/nn/parallel.py",
          "distributed.broadcast(tensor.data, group=group, group_src=0)", "pass",
          "nn/test_parallel::test_divided_equals_whole"),
    Fault("parallel: any of the largest bonds divided", "mumoe_tensor/nn/parallel.py",
          "(sizes[x], entries(x))", "sizes[x]", "nn/test_parallel::test_divided_equals_whole"),
    Fault("layers: copies of rows counted as samples", "mumoe_tensor/nn/norm.py",
          "rows_seen = count / self.copies", "rows_seen = count",
          "nn/test_parallel::test_divided_equals_whole"),
    Fault("layers: published bias row taken for an input", "mumoe_tensor/nn/published.py",
          "bias=extra_rows == {1},", "bias=False,",
          "nn/test_published::test_outputs_and_gradients_are_the_recorded_ones"),
    Fault("layers: published sizes between two weights not compared", "mumoe_tensor/nn/published.py",
          "extra_rows not in ({0}, {1})", "not extra_rows & {0, 1}",
          "nn/test_published::test_sizes_that_do_not_fit_together_are_refused"),
    Fault("layers: a wrong state half loaded", "mumoe_tensor/nn/states.py",
          "    if wrong:", "    if False:",
          "nn/test_states::test_a_state_that_does_not_fit_changes_nothing"),
    Fault("layers: a state with an unexpected name loaded", "mumoe_tensor/nn/states.py",
          "[name for name in state if name not in expected]", "[]",
          "nn/test_states::test_a_state_that_does_not_fit_changes_nothing"),
    Fault("configs: arguments of a module left out", "mumoe_tensor/nn/registry.py",
          'return {"name": name, **arguments}', 'return {"name": name}',
          "nn/test_configs::test_every_argument_comes_back"),
    Fault("surgery: a factor of input and output as large for every bond", "mumoe_tensor/nn/fitting.py",
          "target / _expert(term, {a: ones})", "target",
          "nn/test_linear::test_experts_start_as_a_linear_layer_where_one_factor_has_input_and_output"),
    Fault("surgery: the error of the fit left out", "mumoe_tensor/nn/fitting.py",
          "np.linalg.norm(s[rank:])", "np.linalg.norm(s[:0])",
          "nn/test_linear::test_a_rank_too_small_gives_the_best_fit_and_says_how_far_it_is"),
    Fault("a mask of experts is read as the numbers 0 and 1", "mumoe_tensor/selections.py",
          "[k for k, is_selected in enumerate(entries) if is_selected]", "[int(entry) for entry in entries]",
          "selections::test_every_call_takes_every_kind"),
    Fault("keep_experts: parts shared with the original", "mumoe_tensor/nn/pruning.py",
          "setattr(smaller, name, copy.deepcopy(child))", "setattr(smaller, name, child)",
          "nn/test_pruning::test_keep_experts_loses_nothing_and_shares_nothing"),
    Fault("surgery: outputs are not compared", "mumoe_tensor/nn/reading.py",
          "    if are_equal(y, expected):\n        return None", "    return None",
          "nn/test_surgery::test_a_linear_layer_that_does_more_is_refused_and_nothing_changes"),
    Fault("analysis: experts are not taken away", "mumoe_tensor/analysis/interventions.py",
          "return scale(layer, experts, 0.0, level)", "return scale(layer, experts, 1.0, level)",
          "analysis/test_analysis::test_an_ablated_layer_is_one_with_slices_of_zeros"),
    Fault("analysis: the random gate draws once for all inputs", "mumoe_tensor/analysis/interventions.py",
          "torch.rand(a.shape, generator=generator).argsort(-1)",
          "torch.rand(a.shape[-1:], generator=generator).argsort(-1).expand(a.shape)",
          "analysis/test_analysis::test_a_random_gate_is_as_sparse_and_knows_nothing"),
    Fault("analysis: effects of the other rows forgotten", "mumoe_tensor/analysis/specialization.py",
          "is_right_now.long() - is_right[rows].long()", "is_right_now.long() - 1",
          "analysis/test_analysis::test_effects_are_those_of_ablating_everywhere"),
    Fault("analysis: dead experts are those with a small load", "mumoe_tensor/analysis/usage.py",
          "(self.uses == 0).sum()", "(self.loads == 0).sum()",
          "analysis/test_analysis::test_usage_by_its_definition"),
    Fault("analysis: polysemanticity not normalised", "mumoe_tensor/analysis/specialization.py",
          "share = size / size.sum(1, keepdim=True)", "share = size",
          "analysis/test_analysis::test_polysemanticity_by_its_definition"),
    Fault("files: results of which there are no new ones stay", "mumoe_tensor/files.py",
          "obsolete = [name for name in results if not (new / name).exists()]", "obsolete = []",
          "files::test_new_results_take_the_place_of_all_old_ones"),
    Fault("files: a failure takes the place of the old results", "mumoe_tensor/files.py",
          "            remove(new)\n        raise\n", "            pass\n",
          "files::test_a_failure_changes_nothing"),
    Fault("files: two processes in one folder", "mumoe_tensor/files.py",
          "            lock.acquire()\n", "            pass\n", "files::test_one_process_at_a_time"),
    Fault("spec: a default rank below that of an expert", "mumoe_tensor/spec.py",
          "layer.max_expert_rank >= rank for", "layer.max_expert_rank >= 1 for",
          "training/test_head::test_by_default_an_expert_can_learn_what_a_linear_layer_does"),
    Fault("cli: numbers that are not finite are taken", "mumoe_tensor/cli/app.py",
          "if isinstance(value, int | float) and not (", "if False and not (",
          "cli/test_terminals::test_every_number_is_taken_or_refused_in_one_line"),
    Fault("training: the last epoch's parameters kept", "mumoe_tensor/training/trainer.py",
          "restore_model(self.model, self.best_state)", "pass",
          "training/test_training::test_the_best_epoch_is_kept"),
    Fault("training: a damaged checkpoint is read", "mumoe_tensor/models/weights.py",
          "if checksum(value) != expected[name]:", "if False:",
          "training/test_trainer::test_a_damaged_checkpoint_names_the_layer_and_the_last_good_one"),
    Fault("training: the optimizer starts anew from a checkpoint", "mumoe_tensor/training/checkpoint.py",
          "set_optimizer_state_dict(model, optimizer, whole, options=_whole())", "pass",
          "training/test_trainer::test_killed_at_random_and_run_again_it_ends_the_same"),
    Fault("training: every process takes all rows of a part", "mumoe_tensor/training/batches.py",
          "self._data.batch(part.chunk(self._processes)[self._process])", "self._data.batch(part)",
          "training/test_batches::test_shares_of_processes_are_the_parts_of_one"),
    Fault("training: what is drawn does not depend on the step", "mumoe_tensor/training/trainer.py",
          "seed_of(self.config.seed, self.state.step, self.accelerator.process_index)",
          "seed_of(self.config.seed, self.batches.steps)",
          "training/test_batches::test_every_step_draws_anew_and_a_seed_draws_the_same"),
    Fault("training: a file that is cut off is read", "mumoe_tensor/training/data.py",
          "if len(content) != expected:", "if False:", "training/test_training::test_idx_that_is_refused"),
    Fault("training: half a source left behind", "mumoe_tensor/training/fetch.py",
          'Path(temporary, "package"), Path(temporary, "files")',
          'Path(temporary, "package"), folder / name',
          "training/test_fetch::test_a_failure_leaves_nothing_behind_and_stops_no_other"),
    Fault("training: a package is opened unchecked", "mumoe_tensor/training/fetch.py",
          "check([archive], source.sha256)", "pass",
          "training/test_fetch::test_another_package_is_not_opened"),
    Fault("files: a table that is cut off is read", "mumoe_tensor/readers.py",
          'if not text.endswith("\\n"):', "if False:", "damages::test_a_damage_is_told_in_one_line"),
    Fault("files: a description of tensors is read unchecked", "mumoe_tensor/models/weights.py",
          "if whole != _checksum_of(about):", "if False:", "damages::test_a_damage_is_told_in_one_line"),
    Fault("study: the sparse mixture weighs no output", "mumoe_tensor/study/mixtures.py",
          "torch.cat(outputs) * coefficients[row, expert, None]", "torch.cat(outputs)",
          "study/test_subjects::test_the_dense_and_the_sparse_layer_save_what_their_figures_say"),
    Fault("study: ranks rounded up in the place of nearest", "mumoe_tensor/study/subjects.py",
          'rounding="nearest"', 'rounding="up"',
          "study/test_subjects::test_ranks_come_nearest_to_the_budget"),
    Fault("study: titles of a table read as markup", "mumoe_tensor/study/table.py",
          "table.add_row(*map(Text, row),", "table.add_row(*row,",
          "study/test_table::test_titles_with_brackets_are_shown"),
    Fault("study: everything measured again", "mumoe_tensor/study/sweep.py",
          "if task.key not in done]", "if True or task.key not in done]",
          "study/test_sweep::test_an_interrupted_study_goes_on_where_it_stopped"),
    Fault("study: a step without its backward pass", "mumoe_tensor/study/sweep.py",
          "module(x).backward(gradient)", "module(x)",
          "study/test_sweep::test_steps_have_gradients_and_forwards_have_none"),
    Fault("study: ratios of the medians of different turns", "mumoe_tensor/study/timing.py",
          "Spread.of(value / base for value, base in self._pairs(name))",
          "Spread.of(value / self.seconds[self.baseline][0] for value in self.seconds[name])",
          "study/test_timing::test_ratios_are_taken_within_a_round"),
    Fault("study: a turn that does not wait for the device", "mumoe_tensor/study/timing.py",
          "            function()\n        finish()\n", "            function()\n",
          "study/test_timing::test_a_turn_on_a_device_ends_with_its_work"),
    Fault("GPT-2 asks a device for the range of tokens", "mumoe_tensor/models/gpt2.py",
          "if not is_eager_on_cpu(tokens):", "if False:",
          "cuda::test_a_model_asks_a_device_for_no_value"),
    Fault("GPU check: a row is not saved before the next", "benchmarks/gpu/__main__.py",
          "report.rows.append(row)\n            save()", "report.rows.append(row)",
          "gpu_check::test_every_row_is_saved_when_it_is_there"),
    Fault("study: the dense mixture among the best at the budget", "mumoe_tensor/study/charts.py",
          "if row.budget and is_figure(row.value)]", "if is_figure(row.value)]",
          "study/test_charts::test_the_best_format_of_each_measure"),
    Fault("pages: a comment may open in a script", "mumoe_tensor/html.py",
          'for character in "<>&', 'for character in "&',
          "html::test_json_has_no_character_that_a_script_element_reads"),
    Fault("pages: NaN is no JSON", "mumoe_tensor/html.py",
          "and not isfinite(value)", "and False", "html::test_figures_that_json_lacks_become_strings"),
    Fault("study: a crossover that larger sizes do not keep", "mumoe_tensor/study/summary.py",
          "slow[row.subject] = max(slow[row.subject], names[row.sizes])", "pass",
          "study/test_summary::test_crossover_needs_all_larger_sizes"),
    Fault("heads: features scaled one by one", "mumoe_tensor/models/heads.py",
          "spread if spread > 0 else torch.ones_like(spread)", "features.std(0).clamp_min(1e-6)",
          "training/test_head::test_the_default_head_learns_as_much_as_a_linear_one"),
    Fault("top_k: the last of equal logits wins", "mumoe_tensor/gates.py",
          "backend.cumsum(ties, -1) > places", "backend.cumsum(ties, -1) < places", "gates::test_nasty_rows"),
]  # fmt: skip


def path_of(name: str) -> str:
    """The path of tests: ``nn/test_gate::test_x`` or, of a file in the folder itself, ``gates::test_x``."""
    file, *function = name.split("::")
    return "::".join([f"tests/{'' if '/' in file else 'test_'}{file}.py", *function])


def caught_by(fault: Fault, folder: Path, timeout: float | None = None) -> str | None:
    """Plant a fault in a copy of the repository and name the first test that fails, if one does."""
    copy = folder / re.sub(r"\W+", "-", fault.name)
    ignored = shutil.ignore_patterns(".*", "__pycache__", "docs", "results", "dist", "build")
    shutil.copytree(REPOSITORY, copy, ignore=ignored)
    source = copy / fault.file
    source.write_text(source.read_text().replace(fault.old, fault.new, 1))
    tests = [path_of(name) for name in fault.tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(copy), "MUMOE_HYPOTHESIS_PROFILE": "ci"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        run = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"no end after {timeout:g} s"
    finally:
        shutil.rmtree(copy)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    if run.returncode in (1, 2) and failed:  # 2: a test file could not be imported
        return failed.group(1)
    if run.returncode == 0:
        return None
    raise RuntimeError(f"fault {fault.name!r}: pytest could not run.\n{run.stdout}{run.stderr}")


def main(words: list[str]) -> int:
    """Plant the faults whose name has one of the words, or all."""
    chosen = [f for f in FAULTS if not words or any(w in f.name for w in words)]
    for fault in chosen:
        if fault.old not in (REPOSITORY / fault.file).read_text():
            raise LookupError(f"fault {fault.name!r}: its source is no longer in {fault.file}.")
    start, survived = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for fault, test in zip(chosen, pool.map(lambda f: caught_by(f, Path(folder)), chosen), strict=True):
            print(f"{fault.name:<52} {test or 'SURVIVED'}", flush=True)
            survived += [] if test else [fault]
    caught = len(chosen) - len(survived)
    print(f"{caught} of {len(chosen)} faults caught in {time.monotonic() - start:.0f} s")
    return 1 if survived or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
