"""Deliberate faults in the source, each of which the tests named beside it must catch.

    make mutations                                   all of them, a table; minutes
    .venv/bin/python tests/mutations.py theta status those whose names have one of the words

The tree is copied, one fault put into the copy, and pytest run there; the checkout is never
touched. First the tests run on a copy without a fault, so that a failure means something. The exit
status is 0 if every fault was caught. Coverage says what is run; this says what is noticed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SOURCE = Path("src/gradhpo")


class Fault(NamedTuple):
    name: str
    file: str  # below src/gradhpo
    old: str  # occurs once in the file
    new: str
    tests: str  # arguments of pytest


FAULTS = [
    Fault(
        "implicit: the sign of the indirect term",
        "estimators/implicit.py",
        "lambda u: tree_scale(-1, at.products(u)[1])",
        "lambda u: tree_scale(1, at.products(u)[1])",
        "tests/estimators/test_implicit.py::test_ridge_in_closed_form",
    ),
    Fault(
        "greedy: one discount too many",
        "estimators/greedy.py",
        "optax.tree.add(tree_scale(gamma, acc), indirect)",
        "tree_scale(gamma, optax.tree.add(acc, indirect))",
        "tests/estimators/test_exactness.py::test_every_estimator_is_its_formula[nested]",
    ),
    Fault(
        "reverse: the sweep runs forwards",
        "estimators/reverse.py",
        "_step_backward, carry, xs, reverse=True)",
        "_step_backward, carry, xs)",
        "tests/estimators/test_exactness.py::test_every_estimator_is_its_formula[nested]",
    ),
    Fault(
        "DrMAD: the points of the line one step late",
        "estimators/_line.py",
        "beta = jnp.arange(T, dtype=scalar_dtype(lam)) / T",
        "beta = jnp.arange(1, T + 1, dtype=scalar_dtype(lam)) / T",
        "tests/estimators/test_unrolled.py::test_drmad_is_exact_on_a_straight_line",
    ),
    Fault(
        "HyperDistill: weight S_t = gamma S_{t-1} + gamma",
        "estimators/one_step.py",
        "weight = gamma * memory.weight + 1",
        "weight = gamma * (memory.weight + 1)",
        "tests/estimators/test_distill.py::test_memory_follows_the_closed_form",
    ),
    Fault(
        "HyperDistill: theta = sum x y / sum y y",
        "estimators/distill.py",
        "fitted = _ratio(xy, xx)",
        "fitted = _ratio(xy, yy)",
        "tests/estimators/test_theta.py::test_theta_by_its_definition",
    ),
    Fault(
        "SABA: the mean as if every part had been seen",
        "estimators/saba.py",
        "tree_scale(1 / jnp.maximum(seen.sum(), 1), change)",
        "tree_scale(1 / len(seen), change)",
        "tests/estimators/test_single_loop.py::test_saba_is_its_formula",
    ),
    Fault(
        "guard: memory of a bad validation batch is kept",
        "core/step.py",
        "remembered = jnp.where(judged, derived | explained, estimator.follows)",
        "remembered = derived | explained",
        "tests/core/test_finite_guard.py::test_what_is_remembered_of_a_bad_validation_batch",
    ),
    Fault(
        "guard: the hypergradient is blamed before the validation loss",
        "core/step.py",
        "(derived, Status.NONFINITE_HYPERGRAD),\n        (judged, Status.NONFINITE_VAL_LOSS)",
        "(judged, Status.NONFINITE_VAL_LOSS),\n        (derived, Status.NONFINITE_HYPERGRAD)",
        "tests/core/test_finite_guard.py::test_nan_in_a_batch_is_reported_and_undone",
    ),
    Fault(
        "trees: the ends of a line exchanged",
        "utils/gradients.py",
        "return ((1 - t) * x + t * y).astype(y.dtype)",
        "return (t * x + (1 - t) * y).astype(y.dtype)",
        "tests/estimators/test_distill.py::test_memory_follows_the_closed_form",
    ),
    Fault(
        "reversible: the last bit is lost on the way back",
        "utils/exact_arithmetic.py",
        "+ (x - lower * n)  # i n + (c mod n)",
        "+ (x - lower * n) // 2 * 2",
        "tests/estimators/test_reversible.py -k stored_trajectory",
    ),
    Fault(
        "transforms: eps_root is dropped from Adam's step",
        "transforms/retraceable.py",
        "jnp.sqrt(v / bias2 + eps_root)",
        "jnp.sqrt(v / bias2)",
        "tests/estimators/test_unrolled.py::test_memories_have_one_answer",
    ),
    Fault(
        "run: the decay of the outer rate starts anew in every part of a run",
        "driver/plan.py",
        "else (first, self.of)",
        "else (0, self.of)",
        "tests/driver/test_resume.py::test_the_decay_and_the_fit_go_on",
    ),
    Fault(
        "start: its term is subtracted",
        "core/start.py",
        "return pullback((alpha.params, alpha.opt_state))[0]",
        "return jax.tree.map(lambda x: -x, pullback((alpha.params, alpha.opt_state))[0])",
        "tests/core/test_start.py::test_functions_agree_with_the_training_written_out",
    ),
    Fault(
        "model state: the statistics of before the step",
        "core/dynamics.py",
        "return InnerState(merge(w, w_rest), merge(z, z_rest), model_state), pull",
        "return InnerState(merge(w, w_rest), merge(z, z_rest), inner.model_state), pull",
        "tests/core/test_stateful.py::test_exact_methods_agree_with_the_training_written_out[reverse]",
    ),
    Fault(
        "over tasks: the sum in the place of the mean",
        "estimators/over_tasks.py",
        "hypergrad = jax.tree.map(lambda x: jnp.mean(x, axis=0), got.hypergrad)",
        "hypergrad = jax.tree.map(lambda x: jnp.sum(x, axis=0), got.hypergrad)",
        "tests/estimators/test_over_tasks.py::test_the_hypergradient_is_the_mean",
    ),
    Fault(
        "over tasks: theta of every task by itself",
        "estimators/over_tasks.py",
        "jax.lax.pmean(x, TASKS)",
        "x",
        "tests/estimators/test_theta.py::test_theta_of_a_meta_batch_is_one_fit_to_all_tasks",
    ),
    Fault(
        "discounted sum: one discount too many",
        "estimators/discounted_sum.py",
        "return optax.tree.add(tree_scale(gamma, acc), term), None",
        "return tree_scale(gamma, optax.tree.add(acc, term)), None",
        "tests/estimators/test_discounted_sum.py::test_it_is_its_formula",
    ),
    Fault(
        "slots ignored: they are differentiated all the same",
        "estimators/drmad.py",
        'alpha = without_slots(alpha) if slots == "ignored" else alpha',
        "alpha = alpha",
        "tests/estimators/test_discounted_sum.py -k hessian_alone",
    ),
    Fault(
        "delay: the memory does not see the steps between",
        "core/delay.py",
        "if estimator.advance is not None:",
        "if False:",
        "tests/core/test_delay.py::test_between_updates_weights_and_memory_move_on",
    ),
    Fault(
        "delay: the last updates are the first ones",
        "core/loop.py",
        "state = update(delayed(estimator, estimator.lead, loop=loop), state, first)",
        "state = update(delayed(estimator, 0), state, first)",
        "tests/core/test_delay.py::test_between_updates_weights_and_memory_move_on",
    ),
    Fault(
        "virtual step: the weights go on from where it looked",
        "estimators/virtual.py",
        "return looked._replace(inner=InnerState(*trained))",
        "return looked._replace(inner=looked.inner._replace(opt_state=trained.opt_state))",
        "tests/estimators/test_virtual.py::test_it_is_the_gradient_of_the_step_written_out",
    ),
    Fault(
        "top-k: slots of what is not chosen move",
        "transforms/top_k.py",
        "jax.tree.map(jnp.where, kept, moved, slots.outer)",
        "moved",
        "tests/transforms/test_top_k.py::test_the_others_keep_value_and_slots",
    ),
    Fault(
        "top-k: a part of a projected step is left outside",
        "transforms/top_k.py",
        "return some if outer.project is None else outer.project(some), slots",
        "return some, slots",
        "tests/transforms/test_top_k.py::test_what_ties_coordinates_is_kept",
    ),
    Fault(
        "top-k: progress without what the penalty gains",
        "transforms/top_k.py",
        "gain + (r - s)",
        "gain",
        "tests/transforms/test_top_k.py::test_progress_knows_penalties",
    ),
    Fault(
        "top-k: the constraint of a proximal step is left",
        "transforms/proximal.py",
        "project if constrained else None",
        "None",
        "tests/transforms/test_top_k.py::test_a_part_of_a_proximal_step_stays_in_the_set",
    ),
    Fault(
        "projections: lost digits stay lost",
        "spaces/projections.py",
        "lax.cond(jnp.any(lost), again",
        "lax.cond(jnp.any(lost) & False, again",
        "tests/spaces/test_projections.py::test_small_numbers_keep_their_digits_beside_a_large_one",
    ),
    Fault(
        "projections: Newton's method alone",
        "spaces/projections.py",
        "good &= (state.steps < NEWTON) | (state.steps % 2 == 0)",
        "good &= True",
        "tests/spaces/test_projections.py::test_a_kink_for_every_number_takes_no_step_for_each",
    ),
    Fault(
        "top-k: old momentum chooses",
        "transforms/top_k.py",
        "new = _without_momentum(outer, h, slots, lam)",
        "new, _ = outer.apply(h, slots, lam)",
        "tests/transforms/test_top_k.py::test_old_momentum_holds_nothing_back",
    ),
    Fault(
        "proximal: a simplex in the usual metric under Adam",
        "transforms/proximal.py",
        "simplex_rows(x, total, step=eta)",
        "simplex_rows(x, total)",
        "tests/spaces/test_space.py::test_adam_ends_at_the_minimum_on_a_simplex",
    ),
    Fault(
        "top-k: of equal gains the last",
        "transforms/largest.py",
        "(x == kth) & (rank <= left)",
        "(x == kth) & (rank > jnp.sum(tied) - left)",
        "tests/transforms/test_top_k.py::test_the_largest_as_by_a_stable_sort",
    ),
    Fault(
        "proximal: a step of momentum is the rate",
        "transforms/proximal.py",
        "jnp.asarray(rate / (1 - mu), x.dtype)",
        "jnp.asarray(rate, x.dtype)",
        "tests/transforms/test_proximal.py::test_updates_end_at_the_lasso",
    ),
    Fault(
        "proximal: Adam's averages without their correction",
        "transforms/proximal.py",
        "jnp.sqrt(jnp.where(nu > 0, nu, 1) / corrected)",
        "jnp.sqrt(jnp.where(nu > 0, nu, 1))",
        "tests/transforms/test_proximal.py::test_the_first_step_of_adam_is_the_rate_over_the_slope",
    ),
    Fault(
        "budget: numbers above their bound count in full",
        "spaces/projections.py",
        "[jnp.clip(z, lower, upper) for z in moved]",
        "[jnp.maximum(z, lower) for z in moved]",
        "tests/spaces/test_projections.py::test_budget_is_nearest_feasible_and_idempotent",
    ),
    Fault(
        "spaces: a run does not project",
        "driver/spaces.py",
        "return _projected(outer, spaces) if spaces.projects else outer",
        "return outer",
        "tests/spaces/test_space.py::test_a_run_sees_values_and_keeps_within",
    ),
    Fault(
        "stationarity: of the hypergradient alone",
        "core/outer.py",
        "return Outer(outer.init, apply, settle, project, outer.price, known",
        "return Outer(outer.init, apply, None, project, outer.price, known",
        "tests/estimators/test_nonsmooth.py",
    ),
    Fault(
        "tune: trained anew with what it started from",
        "tuning/command.py",
        "found = holding(target.make(seed), tuned.trial.hyperparams)",
        "found = target.make(seed)",
        "tests/tuning/test_tune.py::test_the_three_trainings_are_what_they_say",
    ),
    Fault(
        "tune: every seed has the draws of the first",
        "tuning/training.py",
        "key, first = jax.random.key(seed), ",
        "key, first = jax.random.key(0), ",
        "tests/tuning/test_tune.py::test_seeds_are_draws_of_their_own",
    ),
    Fault(
        "layers by name: a name within a name",
        "transforms/scaling.py",
        "for n in range(len(names) + 1):",
        "for n in range(1, len(names) + 1):",
        "tests/transforms/test_optax_contract.py::test_numbers_belong_to_parameters_by_name_whatever_holds_them",
    ),
    Fault(
        "tune: the loss of a step that was undone counts",
        "tuning/judging.py",
        'if trial.history.metrics["status"][-1] == Status.NONFINITE_TRAIN_STATE:',
        "if False:",
        "tests/tuning/test_tune.py::test_a_training_that_diverges_is_nan_and_never_the_best",
    ),
    Fault(
        "compare: a product of second order counts as one gradient",
        "tuning/searches.py",
        "cost.gradients + 2 * cost.products",
        "cost.gradients + cost.products",
        "tests/tuning/test_compare.py",
    ),
    Fault(
        "compare: slots of the outer optimizer begin anew with every training",
        "tuning/sequences.py",
        "        outer_opt_state=state.outer_opt_state,\n",
        "",
        "tests/tuning/test_compare.py",
    ),
    Fault(
        "schedules: no derivative in the warm-up",
        "schedules.py",
        "warmup = jnp.clip(warmup, 0, steps)",
        "warmup = jax.lax.stop_gradient(jnp.clip(warmup, 0, steps))",
        "tests/test_schedules.py",
    ),
    Fault(
        "doctor: closed over and flat are taken for each other",
        "doctor/of_derivatives.py",
        "flat = name not in any_way.ignored",
        "flat = name in any_way.ignored",
        "tests/doctor",
    ),
    Fault(
        "doctor: examples never change their company",
        "doctor/of_data.py",
        "loss(0, 3), loss(2, 1)",
        "loss(0, 1), loss(2, 3)",
        "tests/doctor",
    ),
    Fault(
        "doctor: examples of a second epoch count as repeated",
        "doctor/of_data.py",
        "once = _first_pass(train)",
        "once = train",
        "tests/doctor/test_doctor.py -k again",
    ),
    Fault(
        "loaders: the places that were filled up count",
        "datasets/loaders.py",
        "mask = np.arange(wanted) < size",
        "mask = np.arange(wanted) < wanted",
        "tests/datasets/test_loaders.py",
    ),
    Fault(
        "loaders: a source goes on one batch late",
        "datasets/loaders.py",
        "while self._position < wanted:",
        "while self._position <= wanted:",
        "tests/datasets/test_loaders.py",
    ),
    Fault(
        "crossover: a group is every H-th weight",
        "studies/crossover/problem.py",
        "np.arange(flat.size) * len(lam) // flat.size",
        "np.arange(flat.size) % len(lam)",
        "tests/studies/test_crossover.py::test_groups_are_of_neighbours_and_as_even_as_can_be[10]",
    ),
    Fault(
        "checkpoint: files are not flushed",
        "checkpoint/directory.py",
        'for name in (*files, "."):',
        'for name in (".",):',
        "tests/faults/test_power_loss.py::test_03_power_loss_leaves_the_old_or_the_new_state",
    ),
    Fault(
        "checkpoint: what a cut-off save left stays",
        "checkpoint/writer.py",
        "        folder.sweep(path)\n",
        "",
        "tests/faults/test_crashes.py::test_02_crash_before_every_call_of_a_save_leaves_the_old_or_the_new_state",
    ),
    Fault(
        "checkpoint: digests of files are not compared",
        "checkpoint/reader.py",
        "        folder.verify(path)\n",
        "",
        "tests/faults/test_damage.py::test_05_five_hundred_flipped_bits_are_all_found",
    ),
    Fault(
        "checkpoint: digests of leaves are not compared",
        "checkpoint/reader.py",
        "if digest(array) != leaf.sha256:",
        "if False:",
        "tests/faults/test_damage.py::test_05_flipped_bits_are_found_by_the_digests_of_leaves_alone",
    ),
    Fault(
        "checkpoint: all damaged is a fresh start",
        "checkpoint/reader.py",
        "if damaged and found is None:",
        "if False:",
        "tests/faults/test_damage.py::test_06_all_damaged_is_an_error_at_every_start_and_never_a_fresh_one",
    ),
    Fault(
        "checkpoint: a holder on another machine is passed over",
        "checkpoint/lock.py",
        "return here  #",
        "return True  #",
        "tests/faults/test_lock.py::test_11_holder_on_another_machine_is_taken_over_only_if_told",
    ),
    Fault(
        "checkpoint: two writers in one directory",
        "checkpoint/lock.py",
        "        lock.acquire()\n",
        "        pass\n",
        "tests/faults/test_lock.py::test_10_second_writer_in_one_process_is_refused",
    ),
    Fault(
        "checkpoint: sizes are not compared before arrays are made",
        "checkpoint/arrays.py",
        "if declared > there:",
        "if False:",
        "tests/faults/test_hostile_checkpoints.py::test_64_manifest_that_declares_more_than_there_is",
    ),
    Fault(
        "checkpoint: a leaf of another type is cast",
        "checkpoint/leaves.py",
        "if place.kind != leaf.kind:",
        "if False:",
        "tests/faults/test_restore.py::test_21_other_template_is_refused_by_name",
    ),
    Fault(
        "checkpoint: arrays of NumPy are not copied",
        "checkpoint/leaves.py",
        "else np.array(x, _dtype(x))",
        "else np.asarray(x, _dtype(x))",
        "tests/faults/test_disk.py::test_13_state_is_that_of_the_call_whatever_is_written_into_it_later",
    ),
    Fault(
        "checkpoint: a failed save is forgotten",
        "checkpoint/writer.py",
        "            pending.result()\n",
        "            pass\n",
        "tests/faults/test_disk.py::test_13_save_that_failed_is_told_of_at_the_end",
    ),
    Fault(
        "checkpoint: a link within one is followed",
        "checkpoint/directory.py",
        "if file.is_symlink() or not (name in folders or file.is_file()):",
        "if False:",
        "tests/faults/test_hostile_checkpoints.py -k link_within",
    ),
    Fault(
        "checkpoint: too many are removed where many are kept",
        "checkpoint/writer.py",
        "max(0, len(there) + 1 - self._keep)",
        "len(there) + 1 - self._keep",
        "tests/faults/test_crashes.py::test_12_as_many_stay_as_were_asked_for",
    ),
]


def put(fault: Fault, tree: Path) -> None:
    """Write the fault into the source below `tree`."""
    path = tree / SOURCE / fault.file
    text = path.read_text("utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.name!r}: its line is not, or not once, in {fault.file}. The source has moved "
            "on: write the fault for it anew in tests/mutations.py."
        )
    path.write_text(text.replace(fault.old, fault.new), "utf-8")


def failures(tree: Path, tests: str) -> str:
    """The closing line of pytest if tests failed, nothing if they passed."""
    # The package that is installed is the checkout's; what it has compiled is of use here.
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    env = {**os.environ, "PYTHONPATH": str(tree / "src"), "JAX_COMPILATION_CACHE_DIR": cache}
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *tests.split()]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # interrupted, usage, nothing collected
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip().splitlines()[-1] if done.returncode else ""


def main(words: list[str]) -> int:
    faults = [f for f in FAULTS if not words or any(word in f.name for word in words)]
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        sound, faulty = Path(folder, "sound"), Path(folder, "faulty")
        sound.mkdir()
        for name in ("src", "tests", "benchmarks", "pyproject.toml"):
            copy = shutil.copy if (ROOT / name).is_file() else shutil.copytree
            copy(ROOT / name, sound / name)
        for tests in sorted({f.tests for f in faults}):
            if failed := failures(sound, tests):
                print(f"without a fault, {tests}: {failed}")
                return 1
        for fault in faults:
            shutil.copytree(sound, faulty)
            put(fault, faulty)
            start = time.perf_counter()
            caught = failures(faulty, fault.tests)
            seconds = time.perf_counter() - start
            shutil.rmtree(faulty)
            print(f"{'caught' if caught else 'MISSED'}  {seconds:4.0f} s  {fault.name}", flush=True)
            missed += [] if caught else [fault.name]
    print(f"{len(faults) - len(missed)} of {len(faults)} caught")
    return bool(missed) or not faults


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
