"""Conversations: turns of a chat over one cache, saved and gone on with. No terminal, no server."""

from kvist.chat.conversation import Conversation, Turn
from kvist.chat.saved import SavedChat, saved_chat

__all__ = ["Conversation", "SavedChat", "Turn", "saved_chat"]
