"""Messages as Flower records: what goes in comes out, in any thread."""

import threading

import numpy as np
import pytest

from data_schemas.messages import HelloTask
from pipeline.wire import from_record, to_record


def test_a_body_and_its_arrays_come_back() -> None:
    """JSON bytes and float32 arrays survive the record unchanged."""
    sent = np.arange(6, dtype=np.float32).reshape(2, 3)

    body, arrays = from_record(to_record(HelloTask(federation="north"), {"weights": sent}))

    assert body == b'{"federation":"north"}'
    assert arrays["weights"].dtype == np.float32
    np.testing.assert_array_equal(arrays["weights"], sent)


def test_a_record_of_another_kind_is_refused() -> None:
    """A record without our body raises, so that the caller can refuse it."""
    record = to_record(HelloTask(federation="north"))
    del record["body"]

    with pytest.raises(KeyError):
        from_record(record)


def test_threads_decode_at_the_same_time() -> None:
    """Nodes that share a process read their messages together and none fails."""
    record = to_record(HelloTask(federation="north"), {"weights": np.ones(10, dtype=np.float32)})
    failures: list[BaseException] = []

    def decode() -> None:
        try:
            for _ in range(400):
                from_record(record)
        except SystemError as error:
            failures.append(error)

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
