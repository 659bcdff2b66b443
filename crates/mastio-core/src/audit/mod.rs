//! What happened, chained so that history cannot be rewritten.
