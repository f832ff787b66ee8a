"""TFRecord: checksums, framing and messages, and what is said about damaged files."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tfrecord_files as files
from spot_fast.data.datasets import tfrecord
from spot_fast.errors import CorruptImage, UserError


def test_checksum_is_the_masked_one_of_the_format():
    """Of the check value of the Castagnoli polynomial (RFC 3720), and of the tests' own bit-by-bit CRC."""
    assert tfrecord.masked_crc32c(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32
    data = random.Random(0).randbytes(1000)
    assert tfrecord.masked_crc32c(data).to_bytes(4, "little") == files.masked(data)


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "x-train.tfrecord-00000-of-00001"
    path.write_bytes(b"".join(map(files.frame, [b"first", b"", b"third" * 100])))
    return path


def test_records(shard):
    records = list(tfrecord.records(shard))
    assert [tfrecord.verified(record) for record in records] == [b"first", b"", b"third" * 100]
    assert [record.number for record in records] == [0, 1, 2]


def test_indexing_reads_headers_only(tmp_path):
    """The data may lie in a hole of the file: nothing of it is needed."""
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        length = (1 << 40).to_bytes(8, "little")
        file.write(length + files.masked(length))
        file.truncate(12 + (1 << 40) + 4)
    assert [record.length for record in tfrecord.records(path)] == [1 << 40]


@pytest.mark.parametrize("keep, number", [(5, 0), (14, 0), (12 + 5 + 4 + 11, 1), (-1, 2)])
def test_cut_off_file(shard, keep, number):
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"x-train.tfrecord-00000-of-00001 is cut off in record {number}: download"):
        list(tfrecord.records(shard))


def test_damaged_length_and_data(shard):
    content = bytearray(shard.read_bytes())
    content[12 + 5 + 4 + 12 + 4 + 12 + 100] ^= 1
    shard.write_bytes(content)
    first, _, third = tfrecord.records(shard)
    tfrecord.verified(first)
    with pytest.raises(CorruptImage, match="record 2 of .*00001 is damaged: its data does not have its checksum"):
        tfrecord.verified(third)
    content[12 + 5 + 4] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: the length of record 1 does not have its checksum"):
        list(tfrecord.records(shard))


def test_vanished_file(shard):
    record = next(tfrecord.records(shard))
    shard.unlink()
    for act in (lambda: tfrecord.verified(record), lambda: tfrecord.Example(record)):
        with pytest.raises(CorruptImage, match="record 0 of .* cannot be read: No such file"):
            act()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        list(tfrecord.records(shard))


def read_example(path, message):
    path.write_bytes(files.frame(message))
    return tfrecord.Example(next(tfrecord.records(path)))


def values_of(example, name):
    return [tfrecord.read(example.record, *place) for place in example.bytes_list(name)]


def test_features_of_every_type(tmp_path):
    numbers = [0, 1, 127, 128, -1, 2**63 - 1, -(2**63)]
    features = {
        "a": files.bytes_feature([b"", b"x" * 1000, b"y"]),
        "b": files.float_feature([1.5, 2.5]),
        "c": files.int_feature(numbers),
        "d": files.int_feature(numbers, packed=False),
        "e": b"",
    }
    example = read_example(tmp_path / "x", files.example(features))
    assert values_of(example, "a") == [b"", b"x" * 1000, b"y"]
    assert all(example.bytes_list(name) == [] for name in ("b", "c", "d", "e", "nowhere"))


def test_unknown_fields_are_passed_over(tmp_path):
    numbers = ((9 << 3, files.varint(7)), (10 << 3 | 1, bytes(8)), (11 << 3 | 5, bytes(4)))
    unknown = b"".join(files.varint(key) + value for key, value in numbers) + files.delimited(12, b"more")
    example = read_example(tmp_path / "x", unknown + files.example({"a": files.bytes_feature([b"x"])}) + unknown)
    assert values_of(example, "a") == [b"x"]


@settings(max_examples=150, deadline=None)
@given(damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_messages_give_values_or_a_sentence(tmp_path_factory, damage):
    """Nothing but CorruptImage may come out of a message with wrong bytes in it, and no endless loop."""
    message = bytearray(
        files.example({"video": files.bytes_feature([b"x" * 20, b"y" * 300]), "n": files.int_feature([24, 7])})
    )
    for place, value in damage:
        message[place % len(message)] = value
    try:
        example = read_example(tmp_path_factory.getbasetemp() / "damaged", bytes(message))
        values_of(example, "video"), example.bytes_list("n")
    except CorruptImage as error:
        assert "record 0 of" in str(error)


def test_files_of_other_writers_are_read(tmp_path):
    """TensorBoard frames the records, the protobuf library encodes the message."""
    record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer")
    with open(tmp_path / "x", "wb") as file:
        writer = record_writer.RecordWriter(file)
        numbers = [5, -1, 1 << 40]
        writer.write(_protobuf_example({"video": [b"frame", b"other" * 99]}, {"n": numbers}))
        writer.write(b"more")
    first, second = tfrecord.records(tmp_path / "x")
    assert tfrecord.verified(second) == b"more" and tfrecord.verified(first)
    example = tfrecord.Example(first)
    assert values_of(example, "video") == [b"frame", b"other" * 99]


def _protobuf_example(of_bytes, of_integers):
    """A serialised tf.train.Example; its message types are declared here with TensorFlow's field numbers."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def declare(message, **fields):
        """fields: number, type (or the message that the field holds) and whether it is repeated."""
        declared = file.message_type.add(name=message)
        for name, (number, kind, repeated) in fields.items():
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            about = {"type": field.TYPE_MESSAGE, "type_name": f".t.{kind}"} if isinstance(kind, str) else {"type": kind}
            declared.field.add(name=name, number=number, label=label, **about)

    declare("BytesList", value=(1, field.TYPE_BYTES, True))
    declare("Int64List", value=(1, field.TYPE_INT64, True))
    declare("Feature", bytes_list=(1, "BytesList", False), int64_list=(3, "Int64List", False))
    declare("FeatureEntry", key=(1, field.TYPE_STRING, False), value=(2, "Feature", False))  # a map on the wire
    declare("Features", feature=(1, "FeatureEntry", True))
    declare("Example", features=(1, "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
    for name, values in of_bytes.items():
        message.features.feature.add(key=name).value.bytes_list.value.extend(values)
    for name, values in of_integers.items():
        message.features.feature.add(key=name).value.int64_list.value.extend(values)
    return message.SerializeToString()
