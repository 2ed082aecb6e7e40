from parallel.lean_import import import_megatron_core

import_megatron_core()
