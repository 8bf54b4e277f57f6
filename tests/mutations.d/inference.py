"""Breaks of the guarantees of prediction, export and evaluation."""

from tests.mutation import Mutation

PREDICT = "tests/unit/test_predict.py::test_"
EVALUATE = "tests/unit/test_evaluate.py::test_"
ENGINES = "tests/unit/test_engines.py::test_"
EXPORT = "tests/unit/test_export.py::test_"
INFERENCE = "tests/unit/test_inference.py::test_"

MUTATIONS = [
    Mutation(
        file="portrait_dist/inference/watch.py",
        old="        self.asked = True\n",
        new="",
        test=PREDICT + "a_signal_at_any_moment_ends_the_watching_of_a_folder",
        why="a signal at any moment ends --watch",
    ),
    Mutation(
        file="portrait_dist/inference/batch.py",
        old="        except (InputError, DamagedDataError) as error:\n",
        new="        except DamagedDataError as error:\n",
        test=PREDICT + "a_broken_photo_is_named_at_the_end_and_the_others_are_done",
        why="no single photo ends predict for the others",
    ),
    Mutation(
        file="portrait_dist/inference/batch.py",
        old="        if self.journal.was_cut_short(photo):\n",
        new="        if photo is None:\n",
        test=PREDICT + "killed_within_a_photo_the_same_command_continues_and_gives_the_same_files",
        why="what a kill leaves half-written among the masks goes with the next run",
    ),
    Mutation(
        file="portrait_dist/cli.py",
        old="        _refuse_nul(arguments)\n",
        new="",
        test=PREDICT + "wrong_input_gets_one_line_and_nothing_is_written",
        why="a NUL character in an argument is one line",
    ),
    Mutation(
        file="portrait_dist/cli.py",
        old="shorten(word) if len(word) > LONGEST_WORD else word",
        new="word",
        test=PREDICT + "wrong_input_gets_one_line_and_nothing_is_written",
        why="no message is of thousands of characters",
    ),
    Mutation(
        file="portrait_dist/inference/photos.py",
        old="    if not stat.S_ISREG(mode):\n",
        new="    if stat.S_ISDIR(mode):\n",
        test=PREDICT + "a_broken_photo_is_named_at_the_end_and_the_others_are_done",
        why="a pipe among the photos is named and not waited for",
    ),
    Mutation(
        file="portrait_dist/inference/batch.py",
        old="        if not journal.is_ours(photo):\n",
        new="        if photo is None:\n",
        test=PREDICT + "nothing_is_overwritten_without_force",
        why="predict overwrites nothing without --force",
    ),
    Mutation(
        file="portrait_dist/inference/batch.py",
        old="        if journal.is_done(photo, targets):\n            continue\n",
        new="",
        test=PREDICT + "on_a_full_disk_what_is_done_stays_and_the_same_command_continues",
        why="an interrupted predict continues and does nothing twice",
    ),
    Mutation(
        file="portrait_dist/checkpoints.py",
        old="    if assumed and distributed.rank() == 0:\n",
        new="    if assumed and distributed.rank() == 1:\n",
        test=PREDICT + "an_old_checkpoint_that_does_not_say_its_size_is_named_with_what_is_assumed",
        why="a size or an aspect is never guessed in silence",
    ),
    Mutation(
        file="portrait_dist/commands/evaluate.py",
        old="            files.check_writable(path)\n",
        new="            pass\n",
        test=EVALUATE + "an_output_that_cannot_be_written_is_refused_before_anything_is_read",
        why="an output that cannot be written is refused before the long work",
    ),
    Mutation(
        file="portrait_dist/evaluation.py",
        old='            switch.fp32_precision = "ieee"\n',
        new="            pass\n",
        test=EVALUATE + "scores_are_computed_in_full_float32_and_the_settings_come_back",
        why="scores are computed in full float32 whatever the caller has set",
    ),
    Mutation(
        file="portrait_dist/evaluation.py",
        old="    for first in range(0, len(positions), batch_size):\n",
        new="    positions = range(dataset.samples)\n"
        "    for first in range(0, len(positions), batch_size):\n",
        test=EVALUATE
        + "pictures_of_the_worst_and_the_median_samples_read_only_these_samples_again",
        why="pictures of the worst samples need no second pass over the split",
    ),
    Mutation(
        file="portrait_dist/inference/export.py",
        old="self.network((image - self.mean) / self.std)",
        new="self.network(image - self.mean)",
        test=EXPORT + "an_onnx_file_computes_the_networks_alpha_and_documents_itself",
        why="an exported file computes what the network does",
    ),
    Mutation(
        file="portrait_dist/inference/refine.py",
        old="    return np.where(distances[0] <= distances[1], alpha, np.float32(0))\n",
        new="    return np.where(others, np.float32(0), alpha)\n",
        test=INFERENCE + "islands_go_with_their_soft_edges_and_the_largest_person_keeps_its_own",
        why="islands are dropped with their soft edges",
    ),
    Mutation(
        file="portrait_dist/inference/photos.py",
        old="    return photos[part::parts]\n",
        new="    return photos[part :: parts + 1]\n",
        test=PREDICT + "parts_in_any_order_give_the_files_of_one_process_and_do_nothing_twice",
        why="parts together give the files of one process",
    ),
    Mutation(
        file="portrait_dist/inference/journal.py",
        old="        self._append(self._entry(photo))\n",
        new="",
        test=PREDICT + "killed_within_a_photo_the_same_command_continues_and_gives_the_same_files",
        why="a killed predict continues without --force",
    ),
    Mutation(
        file="portrait_dist/inference/segmenter.py",
        old="trained.size, aspect=trained.aspect, **options)",
        new="trained.size, **options)",
        test=INFERENCE + "size_and_aspect_of_the_training_images_come_from_the_checkpoint",
        why="predict takes the aspect of the training images from the checkpoint",
    ),
    Mutation(
        file="portrait_dist/inference/segmenter.py",
        old="        keep_freed_memory()\n",
        new="",
        test="tests/unit/test_malloc.py::test_predicting_again_takes_no_new_memory_from_the_system",
        why="freed memory is kept for the next batch",
    ),
    Mutation(
        file="portrait_dist/inference/engines.py",
        old="    if not difference <= FOREIGN_TOLERANCE:\n",
        new="    if difference < 0:\n",
        test=ENGINES + "other_networks_are_compared_with_torch_before_they_are_used",
        why="OpenVINO computes another network only where it gives what torch gives",
    ),
    Mutation(
        file="portrait_dist/inference/export.py",
        old="        out.unlink(missing_ok=True)\n",
        new="        out.exists()\n",
        test=EXPORT + "an_old_openvino_graph_is_gone_where_its_weights_were_overwritten",
        why="an exported graph never stands beside weights of another network",
    ),
    Mutation(
        file="portrait_dist/inference/model_card.py",
        old='out.with_name(f"{out.name}.card.md")',
        new='out.with_suffix(".card.md")',
        test=EXPORT + "a_model_card_beside_the_file_says_what_the_network_is_and_its_scores",
        why="a card of one format is not that of another",
    ),
    Mutation(
        file="portrait_dist/inference/model_card.py",
        old="            if key not in NOT_SETTINGS and value != default:\n",
        new="            if value != default:\n",
        test=EXPORT + "a_model_card_beside_the_file_says_what_the_network_is_and_its_scores",
        why="a model card tells no places of the machine that trained",
    ),
    Mutation(
        file="portrait_dist/inference/browser_page.html",
        old="values[channel * count + i] = pixels[4 * i + channel] / 255;",
        new="values[channel * count + i] = pixels[4 * i + 2 - channel] / 255;",
        test="tests/unit/test_browser_page.py::test_"
        "a_browser_computes_the_networks_alpha_from_one_file_without_any_connection",
        why="the page gives the network the colours in its order",
    ),
    Mutation(
        file="portrait_dist/inference/watch.py",
        old="            raise failure_of(result)\n",
        new="            pass\n",
        test=PREDICT
        + "a_watched_folder_gives_the_masks_of_photos_as_they_come_and_ends_by_a_signal",
        why="a watched photo that could not be done is no success",
    ),
    Mutation(
        file="portrait_dist/inference/video.py",
        old="    return np.where(near & apart, (before + after) / 2, alpha)\n",
        new="    return np.where(near | apart, (before + after) / 2, alpha)\n",
        test="tests/unit/test_video.py::test_flicker_goes_and_what_moves_stays",
        why="smoothing a video over time leaves what moves alone",
    ),
    Mutation(
        file="portrait_dist/evaluation.py",
        old="key=lambda one: (-one[0], one[1]))\n",
        new="key=lambda one: (one[0], one[1]))\n",
        test=EVALUATE + "pictures_of_a_group_show_the_samples_with_most_of_its_errors_first",
        why="the picture of a group of errors shows where they are most",
    ),
    Mutation(
        file="portrait_dist/inference/batch.py",
        old="        switch_off_opencv_threads()\n",
        new="",
        test=PREDICT + "opencv_starts_no_threads_of_its_own_beside_those_of_predict",
        why="OpenCV starts no threads beside those of predict",
    ),
    Mutation(
        file="portrait_dist/evaluation.py",
        old="    parts = distributed.gather_to_rank_0(rows)\n",
        new="    parts = distributed.gather_objects(rows)\n",
        test=EVALUATE + "rows_of_samples_go_to_rank_0_alone",
        why="rows of samples go to rank 0 alone",
    ),
    Mutation(
        file="portrait_dist/inference/engines.py",
        old="@functools.cache\n",
        new="",
        test="tests/unit/test_engines.py::test_signals_are_handled_after_a_network_of_openvino_is_gone",
        why="no signal meets a freed stack of OpenVINO",
    ),
    Mutation(
        file="portrait_dist/inference/watch.py",
        old=" if one.photo not in again]",
        new="]",
        test="tests/unit/test_predict.py::"
        "test_a_watched_folder_gives_the_masks_of_photos_as_they_come_and_ends_by_a_signal",
        why="a photo that is whole at last is no failure",
    ),
    Mutation(
        file="portrait_dist/models/contract.py",
        old="        return images if self.channels_last else images.contiguous()",
        new="        return images",
        test="tests/unit/test_networks.py::"
        "test_a_network_that_takes_no_channels_last_images_gets_none",
        why="a network that takes no channels-last images gets none",
    ),
    Mutation(
        file="portrait_dist/training/trainer.py",
        old="        self.channels_last = self.options.channels_last and taken",
        new="        self.channels_last = self.options.channels_last",
        test="tests/unit/test_networks.py::"
        "test_a_network_that_takes_no_channels_last_images_gets_none",
        why="nor weights in that memory format",
    ),
    Mutation(
        file="portrait_dist/inference/export.py",
        old="        if info.build is None:\n            raise",
        new="        if True:\n            raise",
        test="tests/unit/test_networks.py::"
        "test_a_network_that_torch_cannot_export_is_one_line_and_leaves_no_file",
        why="a network that torch cannot export is one line",
    ),
    Mutation(
        file="portrait_dist/models/contract.py",
        old="            torch.stack(sums).sum().backward()",
        new="            pass",
        test="tests/unit/test_networks.py::"
        "test_a_network_that_breaks_the_contract_is_refused_in_one_line",
        why="a network without a gradient is refused before anything starts",
    ),
    Mutation(
        file="portrait_dist/models/contract.py",
        old="    if not one.is_floating_point():",
        new="    if False:",
        test="tests/unit/test_networks.py::"
        "test_a_network_that_breaks_the_contract_is_refused_in_one_line",
        why="a mask is of floating point",
    ),
    Mutation(
        file="portrait_dist/training/components.py",
        old="    elif _has_other_names(inspect.signature(metric.update)):",
        new="    elif False:",
        test="tests/unit/test_components.py::test_metrics_by_name_score_the_same_masks",
        why="a metric gets mask and matte whatever it calls them",
    ),
    Mutation(
        file="portrait_dist/training/components.py",
        old="        _try_metric(metric, name)\n    return metric",
        new="        pass\n    return metric",
        test="tests/unit/test_components.py::"
        "test_a_metric_that_fails_or_would_depend_on_ranks_is_refused"
        "[keys4-gives Tensor, not one number]",
        why="a metric that gives no number is refused before anything starts",
    ),
    Mutation(
        file="portrait_dist/training/components.py",
        old="            weight.grad = torch.zeros_like(weight)\n        optimizer.step()\n",
        new="            weight.grad = torch.zeros_like(weight)\n",
        test="tests/unit/test_components.py::"
        "test_optimisers_and_schedules_by_name_get_their_arguments_and_wrong_ones_are_named",
        why="an optimiser that takes no plain step is refused before anything starts",
    ),
    Mutation(
        file="portrait_dist/models/contract.py",
        old="        if isinstance(module, nn.SyncBatchNorm):",
        new="        if False:",
        test="tests/unit/test_networks.py::test_syncbatchnorm_is_checked_on_one_cpu",
        why="a network with SyncBatchNorm passes the check on GPU ranks",
    ),
]
