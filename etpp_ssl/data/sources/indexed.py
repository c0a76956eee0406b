"""The data sources whose images are addressed by index.

One line here makes a new one known to recipes, and to streams as their evaluation images.
"""

from __future__ import annotations

from etpp_ssl.data.sources.file_list import FileListConfig
from etpp_ssl.data.sources.folder import FolderConfig
from etpp_ssl.data.sources.shards import ShardsConfig
from etpp_ssl.data.sources.synthetic import SyntheticConfig
from etpp_ssl.data.sources.timm_dataset import TimmConfig

AnyIndexedData = FolderConfig | FileListConfig | TimmConfig | SyntheticConfig | ShardsConfig
