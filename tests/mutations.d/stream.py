"""Breaks of the stream, the augmentation and the models."""

from tests.mutation import Mutation

ORDER = "portrait_dist/data/stream/order.py"
MIXING = "portrait_dist/data/stream/mixing.py"
SETS = "portrait_dist/data/shards/sets.py"
FOREIGN = "portrait_dist/data/shards/foreign.py"
DATASET = "portrait_dist/data/stream/dataset.py"
LOADER = "portrait_dist/data/stream/loader.py"
PIPELINE = "portrait_dist/data/stream/pipeline.py"
AUGMENT = "portrait_dist/data/augment.py"

MUTATIONS = [
    Mutation(
        file=SETS,
        old="if self._identity([known for _, known in chosen]) == identity:",
        new="if False:",
        test="tests/unit/test_append.py::"
        "test_a_run_of_several_sets_says_their_versions_and_names_the_one_that_has_grown",
        why="of several sets the one that has grown is named",
    ),
    Mutation(
        file="portrait_dist/data/source/pictures.py",
        old="if isinstance(error, UnidentifiedImageError):",
        new="if False:",
        test="tests/unit/test_foreign.py::test_wrong_members_are_refused_at_the_door_by_name",
        why="an error of a member says what is wrong with it, not where it was in memory",
    ),
    Mutation(
        file="portrait_dist/data/shards/cache.py",
        old="if _NAMES_TARS.search(location):",
        new="if False:",
        test="tests/unit/test_foreign.py::"
        "test_tars_of_others_at_an_address_are_refused_by_one_line_that_says_what_to_do",
        why="tars of others at an address are refused before a request",
    ),
    Mutation(
        file="portrait_dist/system/address.py",
        old='(is_address(text) and "," not in text and "?" in text)',
        new='(is_address(text) and "," not in text)',
        test="tests/unit/test_mixing.py::"
        "test_a_single_set_takes_a_weight_too_on_a_disk_or_at_an_address",
        why="a weight of a single set at an address is no part of its name",
    ),
    Mutation(
        file=FOREIGN,
        old='SPLIT_WORDS.findall(f"/{name.lower()}")',
        new='SPLIT_WORDS.findall(f"/{name}")',
        test="tests/unit/test_foreign.py::"
        "test_names_say_their_split_in_capitals_too_and_reach_the_terminal_escaped",
        why="a set of validation is never trained with",
    ),
    Mutation(
        file="portrait_dist/system/address.py",
        old='f"{Decimal(self.weight.numerator) / self.weight.denominator:f}"',
        new='f"{float(self.weight):.10g}"',
        test="tests/unit/test_mixing.py::"
        "test_a_weight_is_the_same_when_it_is_read_again_as_it_was_stored[0.00001]",
        why="a stored configuration holds the weights of its run",
    ),
    Mutation(
        file=FOREIGN,
        old="return first is not None and not _is_packed(first)",
        new="return first is not None",
        test="tests/unit/test_foreign.py::"
        "test_packed_shards_that_lost_their_manifest_are_not_taken_for_foreign_ones",
        why="own shards without a manifest are not complete",
    ),
    Mutation(
        file=FOREIGN,
        old="if first.count(0) != len(first):",
        new="if False:",
        test="tests/unit/test_foreign.py::"
        "test_a_hostile_tar_is_one_clear_line_and_leaves_no_index[two tars in one]",
        why="what tarfile takes for the end is no end",
    ),
    Mutation(
        file=FOREIGN,
        old="return found if found and found.state == _state(tar) else None",
        new="return found",
        test="tests/unit/test_foreign.py::test_tars_are_indexed_once_and_again_when_they_change",
        why="a tar that changed is indexed anew",
    ),
    Mutation(
        file=FOREIGN,
        old="if isal_zlib.crc32(parts[1], isal_zlib.crc32(parts[0])) != crc:",
        new="if False:",
        test="tests/unit/test_foreign.py::"
        "test_a_tar_that_changes_while_it_is_open_never_gives_another_sample",
        why="a sample is what it was when the tar was indexed",
    ),
    Mutation(
        file=MIXING,
        old="places = (places + epoch * count % size) % size",
        new="places = places % size",
        test="tests/unit/test_mixing.py::test_every_sample_comes_as_often_as_its_weight_says",
        why="epochs take the samples of a set in turn",
    ),
    Mutation(
        file=MIXING,
        old="mine = (places[rest] + 1) * count // left > before",
        new="mine = places[rest] < count",
        test="tests/unit/test_mixing.py::"
        "test_the_deal_gives_every_place_of_every_set_once_and_evenly",
        why="blocks have their part of each set",
    ),
    Mutation(
        file=SETS,
        old="{part.weight if self.split == 'train' else 1}",
        new="1",
        test="tests/unit/test_mixing.py::test_a_position_of_other_weights_or_sets_is_refused",
        why="other weights are other data",
    ),
    Mutation(
        file=ORDER,
        old="found = permute(positions, self.samples, hash64(self.seed, epoch))[None]",
        new="found = permute(positions, self.samples, hash64(self.seed, epoch + 1))[None]",
        test="tests/unit/test_order.py::test_the_order_of_today_is_the_order_of_tomorrow",
        why="an older release's run resumes with the same order",
    ),
    Mutation(
        file=ORDER,
        old="return kept[epoch - first].copy()",
        new="return kept[0].copy()",
        test="tests/unit/test_order.py::test_epochs_in_a_row_have_the_order_that_each_has_alone",
        why="orders of short epochs that are found together are each epoch's own",
    ),
    Mutation(
        file=ORDER,
        old="        return found[0].copy()",
        new="        return found[0]",
        test="tests/unit/test_order.py::test_epochs_in_a_row_have_the_order_that_each_has_alone",
        why="a caller who writes to an order spoils no later one",
    ),
    Mutation(
        file=ORDER,
        old="first, _, kept = ahead",
        new="first, _, kept = self._ahead",
        test="tests/unit/test_order.py::"
        "test_threads_that_ask_for_different_positions_get_their_own_samples",
        why="another thread's question between two looks at what is kept changes no answer",
    ),
    Mutation(
        file=ORDER,
        old="return begin + first, begin + end",
        new="return begin + first, begin + end - 1",
        test="tests/unit/test_order.py::test_evaluation_deals_every_position_once_and_evenly",
        why="evaluation deals every position once",
    ),
    Mutation(
        file=PIPELINE,
        old="expected = self._at_end and self.continues and start == 0 and",
        new="expected = self._at_end and self.continues and",
        test="tests/unit/test_loader.py::test_every_epoch_is_exact_whatever_was_expected",
        why="what was decoded for another position is discarded",
    ),
    Mutation(
        file=PIPELINE,
        old="if expected and (epoch == self._epoch + 1 or",
        new="if expected and (epoch >= 0 or",
        test="tests/unit/test_loader.py::test_every_epoch_is_exact_whatever_was_expected",
        why="what was decoded for another epoch is discarded",
    ),
    Mutation(
        file=PIPELINE,
        old="continues and self._threads_wanted > 0",
        new="False",
        test="tests/unit/test_loader.py::test_the_next_epoch_is_decoded_before_it_is_asked_for",
        why="threads decode across the end of an epoch",
    ),
    Mutation(
        file=PIPELINE,
        old="while len(self._pending) < self._prefetch and",
        new="while len(self._pending) < 2 * self._prefetch and",
        test="tests/unit/test_loader.py::test_batches_decoded_ahead_are_bounded",
        why="memory of prefetched batches is bounded",
    ),
    Mutation(
        file=PIPELINE,
        old="weakref.finalize(view, _give_back, buffer, free, self._spare).atexit = False",
        new="_give_back(buffer, free, self._spare)",
        test="tests/unit/test_loader.py::"
        "test_memory_of_batches_is_used_again_only_when_nothing_shares_it",
        why="a batch that is kept stays as it was",
    ),
    Mutation(
        file=PIPELINE,
        old="return self._process == os.getpid()",
        new="return True",
        test="tests/unit/test_loader.py::"
        "test_a_fork_of_a_process_whose_threads_decode_reads_with_its_own",
        why="a fork does not wait for its parent's threads",
    ),
    Mutation(
        file=LOADER,
        old="            if mine:\n                pipeline.close()",
        new="            if mine:\n                self._idle = pipeline",
        test="tests/unit/test_loader.py::"
        "test_no_thread_outlives_a_single_pass_or_one_that_is_left_early",
        why="no thread outlives an iteration that is left early",
    ),
    Mutation(
        file=LOADER,
        old="                if handed_out == batches:",
        new="                if handed_out > plan.batches:",
        test="tests/unit/test_loader.py::"
        "test_a_consumer_that_counts_batches_keeps_the_threads_at_work",
        why="a trainer that counts batches keeps the threads at work",
    ),
    Mutation(
        file=LOADER,
        old="epoch = self._position.epoch + (not self._chosen)",
        new="epoch = self._position.epoch",
        test="tests/unit/test_loader.py::test_each_iteration_is_the_next_epoch_until_one_is_set",
        why="a loop without set_epoch does not repeat one order",
    ),
    Mutation(
        file=LOADER,
        old="self.pin_memory = pin_memory and",
        new="self.pin_memory =",
        test="tests/unit/test_loader.py::"
        "test_a_gpus_page_locked_memory_is_used_only_when_asked_for",
        why="a run on the CPU opens no context on a GPU",
    ),
    Mutation(
        file=AUGMENT,
        old="RISKY = 0.9998",
        new="RISKY = 1.0",
        test="tests/unit/test_augment.py::"
        "test_real_photos_are_those_of_torchvision_within_one_level",
        why="colours on a CPU are torchvision's within one level",
    ),
    Mutation(
        file=AUGMENT,
        old="exact = step < 2 or abs(1 - factor) > 1",
        new="exact = False",
        test="tests/unit/test_augment.py::test_all_steps_but_the_last_give_pillows_levels_exactly",
        why="a difference of one level is not enlarged by the next step",
    ),
    Mutation(
        file=AUGMENT,
        old="behind = without_person(levels, mattes).roll(1, dims=0)",
        new="behind = without_person(levels, mattes).roll(-1, dims=0)",
        test="tests/unit/test_augment.py::test_a_new_background_is_that_of_the_previous_image",
        why="the background is the previous image's",
    ),
    Mutation(
        file="portrait_dist/models/unet.py",
        old='return {**other, "init_features": init_features, "norm": norm}',
        new='return {**other, "init_features": init_features}',
        test="tests/unit/test_unet.py::test_settings_build_the_same_network_again",
        why="a checkpoint says how to build its network",
    ),
    Mutation(
        file=PIPELINE,
        old="start == 0 and most == self._most",
        new="start == 0",
        test="tests/unit/test_loader.py::"
        "test_epochs_cut_short_are_exact_and_keep_the_threads_at_work",
        why="what was decoded for an epoch cut elsewhere is discarded",
    ),
    Mutation(
        file="portrait_dist/data/stream/transforms.py",
        old='        if function in _WITH_GENERATOR and options.get("generator") is None:',
        new="        if False:",
        test="tests/unit/test_transforms.py"
        "::test_torchs_functions_without_a_generator_draw_from_the_samples_own",
        why="transforms draw from the sample's own generator",
    ),
    Mutation(
        file="portrait_dist/data/stream/pipeline.py",
        old="            self._epoch + self._epochs_ahead,\n            positions,",
        new="            self._epoch,\n            positions,",
        test="tests/unit/test_transforms.py::test_threads_ranks_and_resuming_change_no_sample",
        why="transforms draw by the epoch that a sample belongs to",
    ),
]
