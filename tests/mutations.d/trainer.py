"""Breaks of what training, stopping and its files guarantee."""

from tests.mutation import Mutation

CHECKPOINTS = "tests/unit/test_checkpoints.py"
LOOP = "tests/unit/test_training_loop.py"

MUTATIONS = [
    Mutation(
        file="portrait_dist/checkpoints.py",
        old='tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)',
        new='tensor.to("cpu").contiguous()',
        test=f"{LOOP}::"
        "test_a_file_holds_its_epochs_weights_though_training_continues_while_it_is_written",
        why="what is written shares no memory with the network",
    ),
    Mutation(
        file="portrait_dist/files.py",
        old="            os.replace(temporary, path)\n            if durable:\n",
        new="            Path(path).write_bytes(temporary.read_bytes())\n            if durable:\n",
        test=f"{CHECKPOINTS}::"
        "test_kill_9_between_write_and_rename_leaves_the_old_or_the_new_checkpoint",
        why="a checkpoint is renamed into its place",
    ),
    Mutation(
        file="portrait_dist/checkpoints.py",
        old="                damaged = archive.testzip()\n",
        new="                damaged = None\n",
        test=f"{CHECKPOINTS}::test_truncated_empty_flipped_and_foreign_files_are_named",
        why="a flipped bit in the weights is found",
    ),
    Mutation(
        file="portrait_dist/checkpoints.py",
        old="weights_only=True, mmap=mmap",
        new="weights_only=False, mmap=mmap",
        test=f"{CHECKPOINTS}::test_a_checkpoint_file_cannot_execute_code",
        why="a checkpoint cannot execute code",
    ),
    Mutation(
        file="portrait_dist/training/averaging.py",
        old="            if self.sign * value <= self.sign * ranked[0].value:\n",
        new="            if self.sign * value < self.sign * ranked[0].value:\n",
        test=f"{CHECKPOINTS}::"
        "test_the_average_is_the_mean_of_the_best_of_one_network_that_changes_in_place",
        why="only a better model enters the average",
    ),
    Mutation(
        file="portrait_dist/training/averaging.py",
        old="        if self.members and not self._is_current():\n            self.write()\n",
        new="",
        test="tests/ranks/test_killed_runs.py",
        why="an average that a kill has prevented is made up for",
    ),
    Mutation(
        file="portrait_dist/training/loop.py",
        old="        self.losses.append(loss.detach())\n",
        new="        self.losses.append(torch.tensor(loss.item()))\n",
        test=f"{LOOP}::test_the_host_never_waits_for_the_device_within_a_step",
        why="the host never waits within a step",
    ),
    Mutation(
        file="portrait_dist/training/loop.py",
        old="            outputs = to_float32(outputs)\n",
        new="            outputs = outputs.float() if hasattr(outputs, 'float') else outputs\n",
        test=f"{LOOP}::test_in_bf16_every_tensor_of_nested_outputs_reaches_the_loss_in_float32",
        why="all outputs reach the loss in float32",
    ),
    Mutation(
        file="portrait_dist/training/trainer.py",
        old="            find_unused_parameters=not uniform,\n",
        new="",
        test="tests/ranks/test_two_ranks.py",
        why="a network may use other parameters in each step",
    ),
    Mutation(
        file="portrait_dist/training/trainer.py",
        old="        broken = bad is None and not loop.weights_are_finite(",
        new="        broken = False and loop.weights_are_finite(",
        test=f"{LOOP}::test_weights_that_are_not_finite_are_never_saved",
        why="weights that are not finite are never saved",
    ),
    Mutation(
        file="portrait_dist/training/preemption.py",
        old="        self._ignore_save = agreed == SAVE\n",
        new="",
        test="tests/ranks/test_two_ranks.py",
        why="one request for a save is one save",
    ),
    Mutation(
        file="portrait_dist/training/schedules.py",
        old="seen.batch_idx = context.batch_idx // accumulate",
        new="seen.batch_idx = context.batch_idx",
        test=f"{LOOP}::test_schedules_and_the_averaged_weights_count_steps_not_batches",
        why="learning rates count optimiser steps",
    ),
    Mutation(
        file="portrait_dist/training/trainer.py",
        old="step = steps_of(index + 1, accumulate) + total * epoch",
        new="step = index + 1 + total * epoch",
        test=f"{LOOP}::test_schedules_and_the_averaged_weights_count_steps_not_batches",
        why="the averaged weights count optimiser steps",
    ),
    Mutation(
        file="portrait_dist/training/device_batches.py",
        old="iter(self.loader) if cut is None else cut(last)",
        new="iter(self.loader)",
        test=f"{LOOP}::test_epochs_cut_short_do_not_restart_the_decoders",
        why="threads decode across the end of an epoch that is cut short",
    ),
    Mutation(
        file="portrait_dist/training/trackers.py",
        old='        return str(found["id"]) if found["kind"] == kind else ""',
        new='        return ""',
        test="tests/unit/test_trackers.py"
        "::test_mlflow_gets_every_epoch_and_the_settings_and_a_resumed_run_continues",
        why="a resumed run continues the tracker's run",
    ),
    Mutation(
        file="portrait_dist/training/refusals.py",
        old="is_bf16_supported(including_emulation=False)",
        new="is_bf16_supported()",
        test="tests/unit/test_refusals.py::test_bf16_is_refused_on_a_gpu_that_only_emulates_it",
        why="bf16 is refused where it is emulated",
    ),
    Mutation(
        file="portrait_dist/training/refusals.py",
        old="if config.train.sync_bn and not any(",
        new="if config.train.sync_bn and any(",
        test="tests/unit/test_refusals.py::test_sync_bn_is_refused_where_there_is_nothing_to_share",
        why="sync_bn is refused for a network without batch statistics",
    ),
    Mutation(
        file="portrait_dist/training/trackers.py",
        old="        Task._report_subprocess_enabled = False",
        new="        pass",
        test="tests/unit/test_trackers.py::test_clearml_forks_no_process_of_the_training",
        why="a tracker forks no process of the training",
    ),
]
