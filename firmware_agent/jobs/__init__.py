"""Jobs from the cloud: one durable state machine (`machine`), driven by one thread (`runner`), one module per kind."""
