"""What a person looks at: a prepared corpus, a run folder, a chat data set (`gptsmith inspect`)."""
