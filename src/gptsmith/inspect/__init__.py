"""Reports on a prepared corpus, a run folder or a chat data set (`gptsmith inspect`)."""
