"""Sessions of real guests, recorded to a file and replayed against a device without the guest.

`Recorder` listens to a device that is being served and writes down what its driver does, what the
device finds in the guest's memory and in its link, and what it does about it. `replay` puts the
same before a device once more and says where it does otherwise: the recording is a regression test.
`describe` tells what is in a recording.
"""

from vq.recording.format import Event, Header, Kind, RecordingReader, RecordingWriter
from vq.recording.player import Difference, Replay, replay
from vq.recording.recorder import Recorder
from vq.recording.show import describe

__all__ = [
    "Difference",
    "Event",
    "Header",
    "Kind",
    "Recorder",
    "RecordingReader",
    "RecordingWriter",
    "Replay",
    "describe",
    "replay",
]
