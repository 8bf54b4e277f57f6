"""Breaks of what prepare, synth, show, pack and verify guarantee."""

from tests.mutation import Mutation

PREPARE = "tests/unit/test_prepare.py"
PACK = "tests/unit/test_pack.py"
PARTS = "tests/unit/test_pack_parts.py"
SOURCES = "tests/unit/test_sources.py"

MUTATIONS = [
    Mutation(
        file="portrait_dist/data/source/assignment.py",
        old='f"{seed}:{name}".encode()',
        new='f"{name}:{seed}".encode()',
        test=f"{PREPARE}::test_the_split_is_the_same_on_every_machine",
        why="the split is the same on every machine, forever",
    ),
    Mutation(
        file="portrait_dist/data/source/trees.py",
        old="if not entry.is_dir() and os.path.exists(entry.path):",
        new="if False:",
        test=f"{PREPARE}::test_what_is_neither_file_nor_folder_is_refused_by_name",
        why="a named pipe among the images is refused by name",
    ),
    Mutation(
        file="portrait_dist/data/source/pictures.py",
        old="    except Image.DecompressionBombError as error:",
        new="    except ZeroDivisionError as error:",
        test=f"{PREPARE}::test_a_picture_of_too_many_pixels_is_named_beside_other_bad_pairs",
        why="a decompression bomb is named in one line",
    ),
    Mutation(
        file="portrait_dist/data/source/split.py",
        old="OverflowError, RecursionError) as error",
        new="OverflowError) as error",
        test=f"{PREPARE}::test_a_damaged_split_file_is_named",
        why="deep JSON in split.json is damage in one line",
    ),
    Mutation(
        file="portrait_dist/data/source/split.py",
        old="    with atomic_path(target) as temporary:\n"
        "        shutil.copyfile(source, temporary)",
        new='    part = target.with_name(f".{target.name}.part")\n'
        "    shutil.copyfile(source, part)\n    part.replace(target)",
        test=f"{PREPARE}::test_names_of_255_bytes_work",
        why="names as long as the file system allows work",
    ),
    Mutation(
        file="portrait_dist/data/shards/encode.py",
        old="            check_pixels(pair.image, *size)\n",
        new="",
        test=f"{PACK}::test_a_broken_pair_is_named_and_nothing_half_written_is_left",
        why="pack refuses images of too many pixels by name",
    ),
    Mutation(
        file="portrait_dist/data/shards/writer.py",
        old="    info.size, info.mode = length, 0o644\n",
        new="    info.size, info.mode, info.mtime = length, 0o644, int(time.time())\n",
        test=f"{PARTS}::test_a_marker_of_an_older_release_is_taken",
        why="the same pairs give the same bytes at any time",
    ),
    Mutation(
        file="portrait_dist/data/shards/png.py",
        old="    alpha[:, 0] = rows[:, 0]\n",
        new="    alpha[:, 0] = 0\n",
        test="tests/unit/test_decode.py"
        "::test_mattes_of_every_row_filter_give_the_alpha_that_pil_reads",
        why="the alpha of a matte is read to the pixel",
    ),
    Mutation(
        file="portrait_dist/data/shards/plan.py",
        old="    return plans[index::count]\n",
        new="    return plans[index + 1 :: count]\n",
        test=f"{PARTS}::test_the_plan_is_a_pure_function_and_parts_divide_it",
        why="the parts divide the plan",
    ),
    Mutation(
        file="portrait_dist/data/shards/pack_folder.py",
        old="        if theirs and not self._encoder.same_bytes(theirs):",
        new="        if False:",
        test=f"{PARTS}::test_a_machine_that_encodes_otherwise_is_refused_and_both_are_named",
        why="a part that would write other bytes refuses",
    ),
    Mutation(
        file="portrait_dist/data/shards/pack_folder.py",
        old="            if at_work := self._part_at_work():",
        new="            if at_work := None:",
        test=f"{PARTS}::test_a_part_that_is_being_packed_is_refused_and_so_is_all_of_it",
        why="nobody finishes a folder while a part is at work",
    ),
    Mutation(
        file="portrait_dist/data/shards/writer.py",
        old="    remove_abandoned_files(out)\n    write_text(out / MANIFEST",
        new="    write_text(out / MANIFEST",
        test=f"{PARTS}::test_killed_at_any_file_operation_and_started_twice_parts_write_the_bytes_of_"
        "one_process[2]",
        why="killed at any file operation, parts write the bytes of one process",
    ),
    Mutation(
        file="portrait_dist/data/shards/writer.py",
        old="(header.samples, header.bytes) != (len(plan.keys), status.st_size)",
        new="header.samples != len(plan.keys)",
        test=f"{PARTS}::test_finish_finds_a_shard_that_was_cut_or_changed",
        why="a shard that was cut is not taken for whole",
    ),
    Mutation(
        file="portrait_dist/files.py",
        old="                abandoned = not _is_alive(int(named[2]))",
        new="                abandoned = True",
        test=f"{PARTS}::test_only_files_of_dead_processes_are_abandoned",
        why="a living process's temporary file is spared",
    ),
    Mutation(
        file="portrait_dist/data/contact_sheet.py",
        old="    scale = min(size[0] / height, size[1] / width)\n",
        new="    return size\n    scale = min(size[0] / height, size[1] / width)\n",
        test="tests/unit/test_show.py"
        "::test_photos_keep_their_aspect_ratio_and_the_augmentation_is_that_of_training",
        why="show keeps the photos' aspect ratio",
    ),
    Mutation(
        file="portrait_dist/data/source/masks.py",
        old="    if low == 0 < high and ((levels == 0) | (levels == high)).all():",
        new="    if False:",
        test=f"{SOURCES}::test_masks_of_few_levels_show_the_person",
        why="of two levels the upper one is the person",
    ),
    Mutation(
        file="portrait_dist/data/source/masks.py",
        old="    if 0 < high < CLASS_NUMBERS:\n        raise NotAMaskError(",
        new="    if False:\n        raise NotAMaskError(",
        test=f"{SOURCES}::test_class_numbers_are_no_mask",
        why="class numbers are refused, never taken for a dark mask",
    ),
    Mutation(
        file="portrait_dist/data/source/layouts.py",
        old='chosen = "test" if name.upper().endswith("-NP") else split',
        new="chosen = split",
        test=f"{SOURCES}::test_every_layout_is_recognised_split_as_it_says_and_packed_to_the_pixel",
        why="a tree's own splits are followed",
    ),
    Mutation(
        file="portrait_dist/data/source/split.py",
        old="    used = [index for index, key in enumerate(table.keys) if key in given]\n",
        new="    used = [index for index, key in enumerate(table.keys) if key != given]\n",
        test=f"{SOURCES}"
        "::test_a_split_file_of_ones_own_decides_and_leaves_out_what_it_does_not_name",
        why="a split file decides which pairs are used",
    ),
    Mutation(
        file="portrait_dist/data/source/trees.py",
        old="        if self.shown != self.root:\n",
        new="        if False:\n",
        test=f"{SOURCES}::test_an_address_with_a_password_is_not_written_down",
        why="a password in an address is not written down",
    ),
    Mutation(
        file="portrait_dist/data/source/lists.py",
        old="        if any(one >= other for one, other in itertools.pairwise(keys)):",
        new="        if False:",
        test=f"{SOURCES}::test_a_damaged_list_of_a_prepared_folder_is_named",
        why="a pairs.csv out of order is damage",
    ),
    Mutation(
        file="portrait_dist/data/source/split.py",
        old="        if _is_there(split):\n",
        new="        if False:\n",
        test="tests/unit/test_prepare.py::"
        "test_a_folder_that_another_process_has_just_made_is_accepted",
        why="two prepares at once both end well",
    ),
    Mutation(
        file="portrait_dist/data/source/lists.py",
        old='    if not as_written and any("\\n" in value or "\\r" in value for value in '
        "values.values()):",
        new="    if False:",
        test=f"{SOURCES}::test_a_list_that_cannot_be_used_names_the_line",
        why="a quotation mark that is open is named",
    ),
    Mutation(
        file="portrait_dist/data/source/locations.py",
        old="    return text if len(text) <= LONGEST_SHOWN else shorten(text)",
        new="    return text",
        test=f"{SOURCES}::test_a_long_path_of_a_list_does_not_fill_the_line",
        why="a message stays a line of bounded length",
    ),
    Mutation(
        file="portrait_dist/files.py",
        old="    remove_abandoned_files(out)\n    write_text(out / name",
        new="    write_text(out / name",
        test="tests/unit/test_synth.py::test_what_a_kill_left_while_the_folder_was_claimed_goes",
        why="a kill leaves nothing that the same command does not clear",
    ),
]
