"Saving a whole program, and going on with it later, bit for bit"
from betty_nb.checkpoint.file import load_checkpoint, save_checkpoint
