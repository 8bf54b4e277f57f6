"""Breaks of what makes SuperGradients drop in, and of the metrics."""

from tests.mutation import Mutation

ADAPTER = "portrait_dist/training/sg_adapter.py"
DROP_IN = "tests/unit/test_drop_in.py::"
LOGGERS = (
    "tests/unit/test_trackers.py::"
    "test_supergradients_own_logger_is_imported_where_asked_for_and_saves_whole_checkpoints"
)

MUTATIONS = [
    Mutation(
        file=ADAPTER,
        old="        if _holds_a_run(root):",
        new="        if False:",
        test=DROP_IN + "test_a_second_run_of_a_name_never_touches_the_first_ones_best",
        why="a second run of a name has a folder of its own",
    ),
    Mutation(
        file=ADAPTER,
        old="        if self.training_params is not None:\n            self.",
        new="        if True:\n            self.",
        test=DROP_IN + "test_a_network_is_tested_before_any_training[ours]",
        why="test() works before train()",
    ),
    Mutation(
        file=ADAPTER,
        old="            directions[name] = metric.higher_is_better",
        new="            pass",
        test=DROP_IN + "test_the_best_value_follows_a_metrics_own_direction",
        why="the best value follows the metric's direction",
    ),
    Mutation(
        file=ADAPTER,
        old="add_scalars(tag_scalar_dict=scalars, global_step=epoch + 1)",
        new="add_scalars(tag_scalar_dict=scalars, global_step=epoch)",
        test=DROP_IN + "test_tensorboard_has_the_fields_names_and_no_system_cards",
        why="TensorBoard counts epochs from 1",
    ),
    Mutation(
        file=ADAPTER,
        old="        self._thread.join()",
        new="        pass",
        test=DROP_IN + "test_the_system_monitor_has_ended_before_its_file_is_closed[ours]",
        why="the system monitor has ended before its file is closed",
    ),
    Mutation(
        file="portrait_dist/training/lean_import.py",
        old='importer.partition(".")[0] != package:',
        new="False:",
        test="tests/unit/test_lean_import.py::test_stand_ins_are_seen_by_the_framework_alone",
        why="stand-ins touch nobody but SuperGradients",
    ),
    Mutation(
        file="portrait_dist/training/sg_metrics.py",
        old="            counts[ignored] = 0",
        new="            pass",
        test=DROP_IN + "test_supergradients_iou_and_dice_follow_their_definitions[IoU]",
        why="pixels of the ignored class do not count",
    ),
    Mutation(
        file="portrait_dist/metrics.py",
        old="self.counts.flip(1).cumsum(1).flip(1)[:, 1:]",
        new="self.counts.flip(1).cumsum(1).flip(1)[:, :-1]",
        test="tests/unit/test_metrics.py::"
        "test_precision_and_recall_equal_counting_at_every_threshold",
        why="precision and recall at a threshold count the pixels above it",
    ),
    Mutation(
        file="portrait_dist/losses.py",
        old="torch.minimum(probabilities, target)",
        new="(probabilities * target)",
        test="tests/unit/test_losses.py::test_soft_iou_is_one_only_at_the_soft_target_itself",
        why="the soft IoU is largest at the soft target",
    ),
    Mutation(
        file="benchmarks/measure.py",
        old="total += times.user + times.system",
        new="total += 0 * times.user",
        test="tests/unit/test_benchmarks.py::"
        "test_cpu_seconds_count_child_processes_that_live_and_that_ended",
        why="CPU seconds count the children that live",
    ),
    Mutation(
        file="portrait_dist/training/sg_losses.py",
        old="    counted = None if ignore_index is None else target != ignore_index",
        new="    counted = None",
        test="tests/unit/test_sg_losses.py::test_pixels_of_the_ignored_value_do_not_count[255-IoU]",
        why="ignored pixels do not count in SuperGradients' losses",
    ),
    Mutation(
        file="portrait_dist/training/sg_losses.py",
        old="    if loss.dice.apply_sigmoid:",
        new="    if True:",
        test="tests/unit/test_sg_losses.py::"
        "test_bce_dice_is_the_weighted_sum_from_logits_and_from_probabilities",
        why="BCE-Dice takes probabilities where it was told so",
    ),
    Mutation(
        file="portrait_dist/training/sg_parameters.py",
        old="        if params.get(name):",
        new="        if False:",
        test="tests/unit/test_training_params.py::"
        "test_what_is_not_supported_is_refused_before_anything_is_written"
        "[resume_from_remote_sg_logger]",
        why="a parameter that is not honoured is refused",
    ),
    Mutation(
        file="portrait_dist/training/sg_parameters.py",
        old="    if unknown:\n",
        new="    if False:\n",
        test="tests/unit/test_training_params.py::test_what_nobody_reads_is_warned_of",
        why="a parameter that nobody knows is warned of",
    ),
    Mutation(
        file=ADAPTER,
        old="            _exchanged(sg_trainer_utils, unpack_batch_items=self.first_batch),\n",
        new="",
        test=DROP_IN + "test_networks_that_check_their_input_are_shown_what_they_will_get",
        why="networks that check their input see the network's input",
    ),
    Mutation(
        file="portrait_dist/training/trainer.py",
        old="            best_state=self.state_of_best(entries) if better else None,\n",
        new="",
        test=DROP_IN + "test_a_student_is_distilled_as_by_supergradients_own_trainer[False]",
        why="the best checkpoint of a distillation is the student",
    ),
    Mutation(
        file=ADAPTER,
        old='    "scipy",\n    "wandb",\n',
        new='    "scipy",\n',
        test=LOGGERS,
        why="SuperGradients imports no tracker unasked",
    ),
    Mutation(
        file=ADAPTER,
        old='    vars(_module)["torch"] = _SavesAtomically()\n',
        new="    pass\n",
        test=LOGGERS,
        why="checkpoints are whole with every logger of SuperGradients",
    ),
    Mutation(
        file="portrait_dist/training/trainer.py",
        old="        if self.finiteness_is_watched:\n            return\n",
        new="",
        test=DROP_IN
        + "test_early_stopping_that_watches_the_loss_ends_a_training_that_diverges[ours]",
        why="EarlyStop on the loss decides over a loss that is not finite",
    ),
    Mutation(
        file="portrait_dist/training/sg_parts.py",
        old="        register_hydra_resolvers()\n",
        new="        pass\n",
        test="tests/unit/test_components.py::test_supergradients_unet_is_built_by_its_name",
        why="SuperGradients' U-Net is built by its name",
    ),
    Mutation(
        file="portrait_dist/training/trainer.py",
        old="            own = saved.parent.is_dir() and saved",
        new="            own = saved",
        test=DROP_IN
        + "test_a_run_continues_a_checkpoint_of_another_folder_and_averages_its_own_models",
        why="a new run continues a checkpoint of another folder",
    ),
]
