"""Ids sort by the time they were made, also within one batch and one millisecond."""

from caravan.ids import new_id, new_ids


def test_ids_are_time_ordered_uuids_of_version_7():
    ids = [new_id(), *new_ids(10_000), new_id()]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert {(one.version, one.variant) for one in ids} == {(7, "specified in RFC 4122")}
