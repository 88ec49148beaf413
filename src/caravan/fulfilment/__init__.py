"""Is everything that was paid for delivered? Sees what is missing (gaps), names why (diagnose), moves it (repair,
reconciler), and proves what must always be true (invariants). Works through the contexts' own operations."""
