"""Models of other programs, in and out: `clipserve import`, `clipserve export`.

`read_model` takes what others publish, `export_model` writes what others read and holds it against
ours before it is called done. ALBEF's own format, whose files go in and out with momentum weights
and queues, is albef.py. Nothing is downloaded, and nothing in a file is executed.
"""

from clipserve.convert.albef import export_checkpoint as export_checkpoint
from clipserve.convert.albef import write_albef as write_albef
from clipserve.convert.reading import import_model as import_model
from clipserve.convert.reading import read_model as read_model
from clipserve.convert.reading import read_pretrained as read_pretrained
from clipserve.convert.writing import export_model as export_model
