"""Pictures and plots of what an engine gives (extra viz)."""
