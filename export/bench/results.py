"""What every result of a measurement can do."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from tinymim.files import write_json


class JsonResult:
    """Base of a result's dataclass.

    Attributes:
        kind: What its JSON calls itself.
    """

    kind: ClassVar[str]

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; also written to ``path``."""
        fields: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        value = {"kind": self.kind} | fields
        if path is not None:
            write_json(path, value)
        return json.dumps(value, indent=1)
