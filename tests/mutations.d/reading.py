"""Breaks of what the reader of shards, the cache and downloads guarantee."""

from tests.mutation import Mutation

DOWNLOAD = "portrait_dist/data/shards/download.py"
CACHE = "portrait_dist/data/shards/cache.py"
READER = "portrait_dist/data/shards/reader.py"
FORMAT = "portrait_dist/data/shards/format.py"
HOSTILE = "tests/unit/test_hostile_servers.py"
MANY = "tests/unit/test_many_shards.py"

MUTATIONS = [
    Mutation(
        file=FORMAT,
        old="if DIGEST in found and _sha256(found, DIGEST) != _digest(found):",
        new="if False:",
        test="tests/unit/test_manifest.py"
        "::test_every_flipped_bit_of_a_manifest_is_refused_or_harmless",
        why="a flipped bit of the manifest is refused or harmless",
    ),
    Mutation(
        file=FORMAT,
        old='return re.fullmatch("[0-9a-f]{64}", text) is not None',
        new="return True",
        test=f"{HOSTILE}::test_a_hostile_manifest_writes_and_deletes_nothing",
        why="no path is made of an unchecked hash",
    ),
    Mutation(
        file=READER,
        old="        if (height, width) != self._size:",
        new="        if False:",
        test="tests/unit/test_manifest.py"
        "::test_a_flipped_size_of_an_old_manifest_is_found_at_the_first_sample",
        why="the size of an old manifest is compared with the stored pixels",
    ),
    Mutation(
        file=DOWNLOAD,
        old="while length < most and (chunk := _read(answer.stream, most - length)):",
        new="while chunk := _read(answer.stream, CHUNK):",
        test=f"{HOSTILE}::test_bytes_beyond_the_promised_size_are_never_written",
        why="bytes beyond the promised size are never written",
    ),
    Mutation(
        file=DOWNLOAD,
        old="            pace.check(length)\n",
        new="",
        test=f"{HOSTILE}::test_a_drip_ends_and_is_resumed_where_it_was",
        why="a drip ends",
    ),
    Mutation(
        file=DOWNLOAD,
        old="    return UnreachableError(\n",
        new="    return FetchError(\n",
        test=f"{HOSTILE}"
        "::test_a_server_that_was_away_too_long_is_no_damage_and_is_asked_again_later",
        why="a server that is away is no damage",
    ),
    Mutation(
        file=DOWNLOAD,
        old='    bare = urlunsplit(parts._replace(netloc=host, fragment=""))',
        new='    at, bare = "", urlunsplit(parts._replace(netloc=host, fragment=""))',
        test=f"{HOSTILE}::test_a_password_and_a_signature_in_an_address_work_and_are_shown_nowhere",
        why="an address with a password works",
    ),
    Mutation(
        file="portrait_dist/system/address.py",
        old='    return _QUERY_OR_FRAGMENT.sub(r"\\1", text)',
        new="    return text",
        test=f"{HOSTILE}::test_no_error_shows_the_secrets_of_an_address",
        why="no error shows the secrets of an address",
    ),
    Mutation(
        file=CACHE,
        old='f"{found.st_mtime_ns} {found.st_ctime_ns}"',
        new='f"{found.st_mtime_ns}"',
        test="tests/unit/test_cache.py"
        "::test_a_forged_file_of_the_right_name_and_length_is_never_used",
        why="a forged file in the cache is never used",
    ),
    Mutation(
        file=DOWNLOAD,
        old="os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW |",
        new="os.O_RDWR | os.O_CREAT |",
        test="tests/unit/test_cache.py::test_lock_and_part_files_that_are_links_are_refused",
        why="nothing is written through links",
    ),
    Mutation(
        file=READER,
        old="                self._close_down_to(self.most_open)",
        new="                pass",
        test=f"{MANY}::test_shards_open_at_a_time_follow_the_limit_and_indexes_stay_in_memory",
        why="open shards stay below the limit of descriptors",
    ),
    Mutation(
        file=READER,
        old="        if len(sample) != record.length:",
        new="        if False:",
        test=f"{MANY}::test_a_shard_truncated_while_it_is_used_is_damage_and_no_signal",
        why="a shard truncated while it is used is named",
    ),
]
