"""Parts of language models: functions that build layers and graphs. No family is named here."""
