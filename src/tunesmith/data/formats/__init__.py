"""Formats: what the columns of a row mean, and how it becomes a conversation, text, or another kind.

`FORMATS` is the whole list; a format is a row of it. `contract.py` has the kinds that rows become, `table.py`
the list and how a format is found; the other files hold the formats of one family each.
"""

from tunesmith.data.formats.contract import KINDS as KINDS
from tunesmith.data.formats.contract import SUPERVISED as SUPERVISED
from tunesmith.data.formats.contract import Column as Column
from tunesmith.data.formats.contract import Conversation as Conversation
from tunesmith.data.formats.contract import Format as Format
from tunesmith.data.formats.contract import Item as Item
from tunesmith.data.formats.contract import Labelled as Labelled
from tunesmith.data.formats.contract import Preference as Preference
from tunesmith.data.formats.contract import Prompt as Prompt
from tunesmith.data.formats.contract import Segments as Segments
from tunesmith.data.formats.contract import Stepwise as Stepwise
from tunesmith.data.formats.contract import Supervised as Supervised
from tunesmith.data.formats.contract import Text as Text
from tunesmith.data.formats.contract import Tokens as Tokens
from tunesmith.data.formats.table import FORMATS as FORMATS
from tunesmith.data.formats.table import convert as convert
from tunesmith.data.formats.table import resolve_format as resolve_format
from tunesmith.data.reading import AS_USUAL as AS_USUAL
from tunesmith.data.reading import Reading as Reading
from tunesmith.data.reading import RowProblem as RowProblem
